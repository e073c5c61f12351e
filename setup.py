"""What pyproject.toml cannot say: the packages are found, and csrc/, which is not inside fastclip/, is one of them."""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    packages=[
        *find_packages(include=["fastclip", "fastclip.*"]),
        "fastclip.csrc",
        *(f"fastclip.csrc.{folder}" for folder in find_namespace_packages("csrc")),
    ],
    package_dir={"fastclip.csrc": "csrc"},
)
