"Set before torch, datasets or transformers are imported by any test."
import os, tempfile
from pathlib import Path

os.environ.update(OMP_WAIT_POLICY="passive", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="sdpo-hf-"))

ROOT = Path(__file__).resolve().parent.parent
