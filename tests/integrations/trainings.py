"""The same small training in each framework, with its own way to clip: losses, to compare with and without fastclip.

``python trainings.py accelerate lightning ...`` prints them as JSON.
"""

import contextlib
import functools
import json
import logging
import os
import sys
import tempfile
import warnings

import torch
from torch import nn

LIMIT = 0.05
STEPS = 12


def batches(steps=STEPS, loud=20):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) * (loud if step % 5 == 4 else 1) for step in range(steps)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def train_accelerate(prepare=lambda accelerator: None):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))
    prepare(accelerator)
    losses = []
    for x in batches():
        loss = loss_of(model, x)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Regression(nn.Module):
    """A model as Hugging Face's Trainer takes them."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x, labels=None):
        return {"loss": loss_of(self.body, x)}


def hf_trainer(folder, model=None, steps=STEPS, callbacks=None, **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        max_grad_norm=LIMIT,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    rows = [{"x": row} for x in batches(40) for row in x]
    return Trainer(model or Regression(), arguments, train_dataset=rows, callbacks=callbacks)


def hf_losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def train_trainer(prepare=lambda trainer: None):
    with tempfile.TemporaryDirectory() as folder:
        trainer = hf_trainer(folder)
        prepare(trainer)
        trainer.train()
        return hf_losses(trainer)


def train_peft(prepare=lambda trainer: None):
    """LoRA on a GPT-2 of one layer: most parameters are frozen."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16, attn_pdrop=0, embd_pdrop=0,
                        resid_pdrop=0)  # fmt: skip
    model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    tokens = torch.randint(0, 50, (4 * STEPS, 8), generator=torch.Generator().manual_seed(2))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=4, max_grad_norm=0.02, learning_rate=0.05,
            logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
        prepare(trainer)
        trainer.train()
        return hf_losses(trainer)


def lightning_module(optimizer=None, factor=lambda index: 1):
    """`factor`: of the loss of each batch, by its index."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body, self.losses = network(), []

        def training_step(self, x, index):
            loss = factor(index) * loss_of(self.body, x)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            make = optimizer or (lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True))
            return make(self.parameters())

    return Module()


def lightning_trainer(steps=STEPS, **options):
    import lightning

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", devices=1, max_steps=steps, **(quiet | options))


def train_lightning(callback=None):
    own = {"gradient_clip_val": LIMIT} if callback is None else {"callbacks": [callback]}
    module = lightning_module()
    lightning_trainer(**own).fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    return module.losses


def train_fabric(clipper=None):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model = network()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))
    clip = None if clipper is None else clipper(model)
    losses = []
    for x in batches():
        loss = loss_of(model, x)
        fabric.backward(loss)
        if clip is None:
            fabric.clip_gradients(model, optimizer, max_norm=LIMIT)
            optimizer.step()
        else:
            clip.step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@functools.cache
def timm_dispatch_clip_grad():
    try:
        from timm.utils import dispatch_clip_grad
    except ImportError:  # timm's models import torchvision; the file that clips needs none of them
        import importlib.util

        for name in ("timm", "timm.utils"):  # as packages whose __init__ was not run
            sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
        return importlib.import_module("timm.utils.clip_grad").dispatch_clip_grad
    return dispatch_clip_grad


def train_timm(clip=None):
    clip = clip or timm_dispatch_clip_grad()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for x in batches():
        loss = loss_of(model, x)
        loss.backward()
        clip(model.parameters(), LIMIT)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


TRAININGS = {name.removeprefix("train_"): f for name, f in globals().items() if name.startswith("train_")}


@contextlib.contextmanager
def quietly():
    """Without what the frameworks say of themselves."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with quietly():
        losses = {name: TRAININGS[name]() for name in sys.argv[1:]}
    print(json.dumps(losses))
