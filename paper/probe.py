"""Does a distiller distil? How far its correction of the vectors depends on the demonstrations.

    python -m paper.probe --checkpoint out/fine --tasks FOLDER --split class_to_class

The correction is what the distiller adds to where its vectors start: the embeddings of D's last l tokens with
`--vector-start residual`, else nothing. A distiller that passes on what demonstrations say corrects the
vectors of each task in another way; one that does not adds much the same to all of them. Not in the paper.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
from common import check, finish, parse, run_main, setup
from loading import load_all, require_input_vectors
from paper.controls import partners
from sources.tasks import SEEDS, demonstration_set, tasks_of


def get_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__, "preset", "llm", "tasks", "split", "k", "template", "seed", "device")
    parser.set_defaults(dtype="fp32")
    group = parser.add_argument_group("probe")
    group.add_argument("--checkpoint", required=True, help="run folder or checkpoint file")
    group.add_argument("--context-len", type=int, default=900, help="demonstration tokens at most")
    return parser


@torch.no_grad()
def start_and_correction(distiller, demo: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the vectors of demonstration tokens start, and what the distiller adds to that, both (l, d)."""
    ids = torch.tensor([demo], device=device)                                           # (1, T_d)
    vectors, embed = distiller(ids, torch.ones_like(ids, dtype=torch.bool))[0], distiller.residual_embed
    if embed is None:
        return torch.zeros_like(vectors), vectors
    rows = embed(ids[0, -len(vectors):]).float()                                        # (<= l, d)
    start = F.pad(rows, (0, 0, len(vectors) - len(rows), 0))                            # (l, d)
    return start, vectors - start


def figures_of(starts: Tensor, corrections: Tensor, swapped: Tensor) -> dict:
    """What the corrections of n tasks have in common, and what other text before the same last l tokens
    changes.

    Args:
        starts, corrections, swapped: (n, l, d); swapped are the corrections with another task's text in
        front.
    Returns:
        shared_energy (share of the corrections' sum of squares that their mean holds), mean_cosine (over
        pairs), least_change and most_change (of |swapped - correction| / |correction|), all None without any
        correction; rms_correction and rms_start.
    """
    flat, other = corrections.flatten(1), swapped.flatten(1)                            # (n, l d)
    n, rms = len(flat), {"rms_correction": corrections.pow(2).mean().sqrt().item(),
                         "rms_start": starts.pow(2).mean().sqrt().item()}
    if not flat.any():
        return dict.fromkeys(("shared_energy", "mean_cosine", "least_change", "most_change")) | rms
    unit = F.normalize(flat, dim=1)
    cosines = (unit @ unit.T).triu(diagonal=1).sum() / (n * (n - 1) / 2)
    change = (other - flat).norm(dim=1) / flat.norm(dim=1)                              # (n,)
    return {"shared_energy": (n * flat.mean(dim=0).pow(2).sum() / flat.pow(2).sum()).item(),
            "mean_cosine": cosines.item(),
            "least_change": change.min().item(), "most_change": change.max().item(), **rms}


def main(argv: list[str] | None = None) -> dict:
    args = parse(get_parser(), argv)
    check((args.seed in SEEDS, f"--seed {args.seed}: MetaICL's are {sorted(SEEDS)}"),
          *common.shared_rules(args), *common.at_least(args, 1, "context_len"))
    device = setup(args, training=False)
    tasks = tasks_of(args)
    check((len(tasks.test) > 1, f"--tasks {' '.join(args.tasks)} has one meta-test task of {args.split}, and "
                                "tasks are compared"))
    _, distiller, _, formatter = load_all(args, device)
    require_input_vectors(distiller, "paper.probe")
    demos = {}
    for task in tasks.test:
        examples, files = demonstration_set(tasks, task, args.seed, args.k)
        demos[task] = formatter.demonstrations(examples, formatter.limit(examples + files["test"]))
    found = []
    for task in tqdm(tasks.test, desc="probe", unit="task"):
        other, = partners("mend_swapped", task, tasks.test, tasks)
        own, tail = demos[task], demos[task][-args.distill_len:]
        start, correction = start_and_correction(distiller, own, device)
        front = demos[other][:len(own) - len(tail)]  # as much of another task's text
        found.append((start, correction, start_and_correction(distiller, front + tail, device)[1]))
    figures = figures_of(*map(torch.stack, zip(*found, strict=True)))
    if figures["rms_correction"]:
        print(f"the mean correction holds {figures['shared_energy']:.1%} of the corrections' energy, over "
              f"{len(tasks.test)} tasks; mean cosine between tasks {figures['mean_cosine']:.3f}")
        print(f"another task's text before the same last {args.distill_len} tokens changes a correction by "
              f"{figures['least_change']:.0%} to {figures['most_change']:.0%}")
    print(f"root mean square {figures['rms_correction']:.4f}, of the start {figures['rms_start']:.4f}")
    return finish({"split": args.split, "tasks": len(tasks.test), "seed": args.seed, **figures})


if __name__ == "__main__":
    run_main(main)
