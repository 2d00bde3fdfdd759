"Reads everything from settings.ini, so that the package has one description."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser(delimiters=["="])
cfg.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
s = cfg["DEFAULT"]
lib = s["lib_path"]
setup(
    version=s["version"],
    description=s["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=s["author"], author_email=s["author_email"], url=s["git_url"], keywords=s["keywords"].split(),
    packages=[lib, f"{lib}.data"],
    package_dir={lib: lib, f"{lib}.data": "data"},
    include_package_data=False,
    package_data={f"{lib}.data": ["**/*"]},
    install_requires=s["requirements"].split(),
    extras_require={extra: s[f"{extra}_requirements"].split() for extra in ("dev", "peft", "eval")},
    entry_points={"console_scripts": s["console_scripts"].split(),
                  "nbdev": [f"{lib}={lib}._modidx:d"]},
    zip_safe=False,
)
