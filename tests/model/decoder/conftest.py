"""The compiled products alone, for tests of matrices."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from asyncengine import builds
from asyncengine.builds import Recipe
from asyncengine.model.attention import kernel
from tests.model.attention.targets import less_optimised, require_target

TARGETS = ["-march=native", "-march=x86-64-v3", "-march=x86-64"]


@pytest.fixture(scope="session", params=TARGETS)
def library(request: pytest.FixtureRequest) -> Any:
    """The compiled products for processors of this age, and no model; kept, so that all processes share it.

    What the compiler makes of them when it takes its time is in the libraries of models, which are tested too.
    """
    target = request.param
    require_target(target)
    included = kernel.SOURCE.parent  # wherever the package is installed
    recipe = Recipe(
        what="the products",
        name="products",
        sources=(Path(__file__).with_name("product_driver.cpp"), kernel.SOURCE, *kernel._INCLUDED),
        before=(*less_optimised(), f"-I{included}", "-DPAGED_ATTENTION_SERIAL", "-DONE_KIND=9"),
        targets=((target,),),
    )
    loaded = kernel.load(builds.build(recipe, kernel.find_compiler()))
    loaded.product.argtypes = (*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_void_p)
    return loaded
