"""What a sceptic asks for beside a result: an answer without an LLM, and vectors of other demonstrations.

A distiller that distils needs the demonstrations of this task, with their own labels.
"""

from collections import Counter

import torch

from common import check
from data import Formatter
from score import distil
from sources.tasks import Tasks, demonstration_set, require_options


def majority(demos: list[dict], queries: list[dict]) -> list[str]:
    """The most frequent label of the demonstrations (of equally frequent ones the first), without any LLM.
    Where that is none of a query's options (multiple choice), the position that was right most often."""
    label = Counter(d["output"] for d in demos).most_common(1)[0][0]
    places = Counter(d["options"].index(d["output"]) for d in demos if d["output"] in d["options"])
    place = places.most_common(1)[0][0] if places else 0
    return [label if label in q["options"] else q["options"][min(place, len(q["options"]) - 1)]
            for q in queries]


def partners(method: str, task: str, evaluated: list[str], tasks: Tasks) -> list[str]:
    """Whose demonstrations a control reads, or made its vectors: of icl_swapped and mend_swapped, one
    other task's (see Tasks.partner); of mend_constant, all others'. Other methods: nobody's.

    The list is that of the tasks evaluated, or, for a single one, of all meta-test tasks.
    """
    if method not in ("icl_swapped", "mend_swapped", "mend_constant"):
        return []
    names = [t for t in tasks.test if t in evaluated or len(evaluated) == 1]
    check((len(names) > 1, f"{method} needs another meta-test task's demonstrations; {task} is alone here"))
    at = names.index(task)
    if method != "mend_constant":
        return [tasks.partner(task, names)]
    return names[:at] + names[at + 1:]


def task_vectors(task: str, seed: int, llm, distiller, formatter: Formatter, tasks: Tasks,
                 args) -> torch.Tensor:
    """(1, l, d): the vectors that `mend` has on a task."""
    demos, files = demonstration_set(tasks, task, seed, args.k)
    parts = formatter.parts(demos, formatter.limit(demos + files["test"]))
    return distil(parts, distiller, llm.device, args.dtype, formatter.turns.head)


def permute_labels(examples: list[dict]) -> list[dict]:
    """Each label replaced by the next of its example's options by the alphabet: consistent, and wrong."""
    require_options(examples)
    changed = []
    for example in examples:
        options = sorted(set(example["options"]))
        changed.append(example | {"output": options[(options.index(example["output"]) + 1) % len(options)]})
    return changed
