"""Parameter shapes of real models, from their published configurations."""

from __future__ import annotations

import math

Shapes = list[tuple[int, ...]]


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2; the defaults are the 124M one: 148 tensors, 124,439,808 elements."""
    block = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (context, width), *block * layers, (width,), (width,)]


def resnet50() -> Shapes:
    """ResNet-50: 161 tensors, 25,557,032 elements."""

    def convolution(inputs: int, outputs: int, kernel: int) -> Shapes:
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


def small_cnn() -> Shapes:
    """53 convolutions of 64 channels with biases and scales: 159 tensors, 2M elements."""
    return [(64, 64, 3, 3), (64,), (64,)] * 53


MODELS: dict[str, Shapes] = {
    "gpt2-124m": gpt2(),
    "resnet50": resnet50(),
    "small-cnn": small_cnn(),
    "2000x256": [(256,)] * 2000,
    "one-16": [(16,)],
}


def elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)
