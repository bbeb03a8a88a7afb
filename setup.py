"""The packages of rsfast: `kernels/` is installed as `rsfast.kernels`."""

from setuptools import setup

setup(
    packages=["rsfast", "rsfast.data", "rsfast.kernels", "rsfast.models", "rsfast.recipes"],
    package_dir={"rsfast": "rsfast", "rsfast.kernels": "kernels"},
    package_data={"rsfast.recipes": ["*.toml"]},
)
