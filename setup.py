"""Package description of vlp_jax. Tool settings live in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION: dict[str, str] = {}
exec((ROOT / "vlp_jax" / "version.py").read_text(), VERSION)

setup(
    name="vlp_jax",
    version=VERSION["__version__"],
    description="Vision-language pretraining in JAX at a fraction of the usual cost.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(
        include=["vlp_jax", "vlp_jax.*", "configs", "configs.*", "tools", "tools.*"]
    ),
    package_data={"vlp_jax": ["**/*.html", "**/*.css", "**/*.js", "py.typed"]},
    python_requires=">=3.11",
    # Ranges admit jax 0.10 on Python 3.11 and jax 0.11 on Python 3.12; exact versions for CPU
    # are in requirements/cpu.txt.
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8",
        "chex>=0.1.90",
        "flax>=0.12,<0.14",
        "grain>=0.2.18",
        "importlib-resources>=6",
        "jax>=0.10,<0.12",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "opencv-python-headless>=4.10",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "psutil>=6",
        "rich>=13",
        "safetensors>=0.5",
        "simplejpeg>=1.8",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.21",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        # Public code with which tests compare ours where it is installed; nothing else needs it.
        # That of the caption metrics is 104 MB, part Java, and its BLEU not for commercial use.
        "parity": ["pycocoevalcap>=1.2", "scikit-learn>=1.5"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "test": ["mypy>=1.15", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.11"],
        "wandb": ["wandb>=0.19"],
    },
)
