"""Packages of the wheel; everything else is in pyproject.toml. `recipes` and `data_tools` lie at the top of the
repository and are installed as `unigen.recipes` and `unigen.data_tools`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["unigen", "unigen.*"]), "unigen.recipes", "unigen.data_tools"],
    package_dir={"unigen.recipes": "recipes", "unigen.data_tools": "data_tools"},
)
