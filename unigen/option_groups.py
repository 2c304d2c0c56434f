"""All groups of options: what command lines, the HTTP schema and evaluation are derived from."""

from __future__ import annotations

from functools import cache

from unigen.inference.options import local_groups
from unigen.options import GroupType, find_groups

ROOMS = ("unigen.backends.diffusers_options",)
"""Modules with the groups that only other engines than the local one take."""


@cache
def collect() -> tuple[GroupType, ...]:
    """Every group of every room, in the order in which help lists them."""
    return (*local_groups(), *(group for room in ROOMS for group in find_groups(room)))
