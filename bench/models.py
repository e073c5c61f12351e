"""The parameter shapes of real models, from their published configurations, and a few synthetic extremes."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

Shape = tuple[int, ...]


class Model(NamedTuple):
    """The gradients of a model."""

    shapes: list[Shape]
    published: int | None = None  # the number of parameters its authors, or its reference implementation, state
    misaligned: bool = False  # every gradient starts one element past an aligned address

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def find(name: str) -> Model:
    """A model of MODELS, or "TxN": T tensors of N elements each. ValueError if it is neither."""
    if name in MODELS:
        return MODELS[name]
    if match := re.fullmatch(r"(\d+)x(\d+)", name):
        tensors, elements = map(int, match.groups())
        return Model([(elements,)] * tensors)
    raise ValueError(f"no model is called {name!r}; there are TxN (T tensors of N elements) and {', '.join(MODELS)}")


def gpt2(layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    block = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (context, width), *block * layers, (width,), (width,)]


def resnet50() -> list[Shape]:
    def convolution(inputs: int, outputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]  # and its batch norm

    shapes = convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def vit_b16(width: int = 768, layers: int = 12) -> list[Shape]:
    """torchvision's, for images of 224 and 1000 classes."""
    block = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    stem = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width)]
    return [*stem, *block * layers, (width,), (width,), (1000, width), (1000,)]


def bert_base(width: int = 768, layers: int = 12) -> list[Shape]:
    """Uncased, with the pooler."""
    square = [(width, width), (width,)]
    norm = [(width,), (width,)]
    block = [*square * 4, *norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,), *norm]
    return [(30522, width), (512, width), (2, width), *norm, *block * layers, *square]


def llama(layers: int, width: int, key_value: int, hidden: int, tied: bool, vocabulary: int = 128256) -> list[Shape]:
    attention = [(width, width), (key_value, width), (key_value, width), (width, width)]
    block = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    head = [] if tied else [(vocabulary, width)]
    return [(vocabulary, width), *block * layers, (width,), *head]


def mixtral(
    layers: int, width: int, key_value: int, hidden: int, experts: int, vocabulary: int, norms: int = 2
) -> list[Shape]:
    """A mixture of experts as Mixtral has it: a router, and three matrices for each expert of each layer."""
    attention = [(width, width), (key_value, width), (key_value, width), (width, width)]
    expert = [(hidden, width), (width, hidden), (hidden, width)]
    block = [*attention, (experts, width), *expert * experts, *[(width,)] * norms]
    return [(vocabulary, width), *block * layers, (width,), (vocabulary, width)]


MODELS: dict[str, Model] = {
    "small-cnn": Model([(64, 64, 3, 3), (64,), (64,)] * 53),  # no one's in particular: 159 tensors in 2M elements
    "resnet50": Model(resnet50(), 25_557_032),
    "vit-b16": Model(vit_b16(), 86_567_656),
    "bert-base": Model(bert_base(), 109_482_240),
    "gpt2-124m": Model(gpt2(12, 768), 124_439_808),
    "gpt2-1.5b": Model(gpt2(48, 1600), 1_557_611_200),
    "llama-3.2-1b": Model(llama(16, 2048, 512, 8192, tied=True), 1_235_814_400),
    "llama-3-8b": Model(llama(32, 4096, 1024, 14336, tied=False), 8_030_261_248),
    "mixtral-8x7b": Model(mixtral(32, 4096, 1024, 14336, 8, 32000), 46_702_792_704),
    # the same make with 64 small experts and norms on queries and keys: 3,219 tensors
    "olmoe-1b-7b": Model(mixtral(16, 2048, 2048, 1024, 64, 50304, norms=4), 6_919_161_856),
    "2000x256": Model([(256,)] * 2000),
    "10000x16": Model([(16,)] * 10000),
    "one-1.5b": Model([(1_500_000_000,)]),
    "misaligned": Model([(512, 513)] * 256, misaligned=True),
}
