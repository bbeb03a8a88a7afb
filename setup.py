"""The packages of rsfast: `kernels/` is installed as `rsfast.kernels`."""

from setuptools import setup

setup(
    packages=[
        "rsfast",
        "rsfast.data",
        "rsfast.experiments",
        "rsfast.kernels",
        "rsfast.models",
        "rsfast.recipes",
    ],
    package_dir={"rsfast": "rsfast", "rsfast.kernels": "kernels"},
    package_data={"rsfast.experiments": ["*.toml"], "rsfast.recipes": ["*.toml"]},
)
