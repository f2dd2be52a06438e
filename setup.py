# All metadata is in pyproject.toml; build steps that are programs, such as a compiled extension, are declared here.
from setuptools import setup

setup()
