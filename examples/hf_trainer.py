"""Hugging Face's Trainer, twice from the same start: with its own clip, and with fastclip inside its optimizer's step.

A GPT-2 of two layers learns the source of Python's standard library, byte by byte, with the Trainer's default optimizer
(fused AdamW). One line attaches fastclip; everything else stays the Trainer's, and so do the losses and the norms that
it logs. A third run clips by a rule that finds its own limit, and stops half-way: a new Trainer resumes it from its
checkpoint, which holds what the rule remembers.

    pip install '.[demo]' transformers accelerate
    python examples/hf_trainer.py
"""

import argparse
import pathlib
import sysconfig
import tempfile

import torch
from tabulate import tabulate
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

import fastclip

CONTEXT, BATCH = 32, 8
MAX_NORM = 1.0


def read_rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """`count` pieces of the standard library's source files, as the Trainer takes them."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    starts = torch.randint(len(text) - CONTEXT, (count,), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": piece, "labels": piece} for piece in (text[start : start + CONTEXT] for start in starts)]


def trainer_of(args: argparse.Namespace, folder: str, steps: int, save: bool = False) -> Trainer:
    """A Trainer of a fresh model, which is the same each time."""
    torch.manual_seed(args.seed)
    config = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_layer=2, n_head=4, n_embd=64)
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        max_grad_norm=MAX_NORM,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps" if save else "no",
        save_steps=max(1, args.steps // 2),
        report_to=[],
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
        seed=args.seed,
    )
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=read_rows(args.steps * BATCH, args.seed))
    trainer.remove_callback(PrinterCallback)
    return trainer


def logged(trainer: Trainer, name: str) -> torch.Tensor:
    """[S] what the Trainer has logged of each step."""
    return torch.tensor([line[name] for line in trainer.state.log_history if name in line])


def main(argv: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Train, compare, and return the losses of each run."""
    parser = argparse.ArgumentParser(description="fastclip in Hugging Face's Trainer.")
    parser.add_argument("--steps", type=int, default=60, help="of each run (60)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, losses = [], {}

    def note(name: str, trainer: Trainer) -> None:
        losses[name], norms = logged(trainer, "loss"), logged(trainer, "grad_norm")
        last = losses[name][-args.steps // 4 :].mean().item()
        rows.append([name, last, norms.median().item(), norms.max().item()])

    with tempfile.TemporaryDirectory() as folder:
        plain = trainer_of(args, folder, args.steps)
        plain.train()
        note("the Trainer's own clip", plain)

        trainer = trainer_of(args, folder, args.steps)
        fastclip.integrations.transformers.attach(trainer)
        trainer.train()
        note("fastclip, in the step", trainer)

        for steps in (args.steps // 2, args.steps):
            trainer = trainer_of(args, folder, steps, save=True)
            attached = fastclip.integrations.transformers.attach(trainer, rule=fastclip.rules.ZClip(warmup=10))
            trainer.train(resume_from_checkpoint=steps == args.steps)
        note("ZClip, stopped and resumed", trainer)
        decided = attached.state_dict()["sets"][0]["steps"]

    print(tabulate(rows, ["run", "final loss", "median norm", "largest norm"], floatfmt=("", ".4f", ".3f", ".3f")))
    own, ours = list(losses.values())[:2]
    print(
        f"\nLargest relative difference of the losses with and without fastclip: {((ours - own).abs() / own).max():.0e}"
    )
    print(f"ZClip has seen {decided} steps, those before the stop included.")
    return losses


if __name__ == "__main__":
    main()
