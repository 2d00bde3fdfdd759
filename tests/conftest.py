"Set before torch, datasets or transformers are imported by any test."
import atexit, os, shutil, tempfile
from pathlib import Path

os.environ.update(OMP_WAIT_POLICY="passive", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")
if "HF_HOME" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="sdpo-hf-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent
