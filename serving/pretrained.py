"""A distiller as one object: what turns demonstrations into vectors, with all that belongs to it.

    python distill.py --checkpoint out/fine --publish my-distiller    # such a folder, of a run

    distiller = Distiller.from_pretrained("my-distiller", llm=llm)            # docs/serving.md
    vectors = distiller.distill(tokenizer, [{"input": "walk", "output": "she walks"}])

The folder is like any other on the hub: model.safetensors (the weights, and in its header the LLM's name and
hashes, template, l and what it was trained on), config.json (that header, to be read by people) and a card.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import UserError, check, require_finite
from data import Formatter
from loading import load_checkpoint, make_formatter, restored, set_length
from score import distil
from serving.vectors import EXPORTS
from serving.writer import Writer
from sources.files import write_tensors, write_whole
from sources.headers import check_fields, check_llm_config, sealed
from sources.text import Tokenizer, first_line
from variants import FreeVectors

WEIGHTS = "model.safetensors"
CARD = """---
{{ card_data }}
---

# {{ model.distill_len }} vectors in place of demonstrations, for {{ model.llm.name }}

A distiller of [MEND](https://arxiv.org/abs/2403.06914) (Li et al., ICLR 2024): it turns demonstrations of a
task into {{ "up to " if model.elastic else "" }}{{ model.distill_len }} vectors, which the frozen LLM
{{ model.llm.name }} reads in their place. The vectors mean nothing to another LLM.

| | |
|---|---|
| architecture | `{{ model.distiller }}` |
| l, the number of vectors | {{ "any up to " if model.elastic else "" }}{{ model.distill_len }} |
| template | `{{ model.template }}` |
{% for name, value in model.llm.items() -%}
| LLM, {{ name }} | {{ value }} |
{% endfor -%}
{% for stage, about in trained_on.items() -%}
| {{ stage }} | {{ about | dictsort | map("join", " ") | join(", ") }} |
{% endfor -%}
| step, commit | {{ step }}, {{ commit }} |
{% for name, value in metrics.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from serving.pretrained import Distiller
llm, tokenizer = (kind.from_pretrained("{{ base }}") for kind in (AutoModelForCausalLM, AutoTokenizer))
distiller = Distiller.from_pretrained("THIS FOLDER", llm=llm)
vectors = distiller.distill(tokenizer, [{"input": "walk", "output": "she walks"}])
```

Of `layers:N`, and of a sibling, these are a language model's own weights, trained on: its licence binds them,
and so may the training data's.
"""


class Distiller(PyTorchModelHubMixin, library_name="mend", paper_url="https://arxiv.org/abs/2403.06914",
                tags=["mend", "in-context-learning", "prompt-compression"], model_card_template=CARD):
    """A checkpoint, and, where its LLM is given, the distiller itself.

    Args:
        tensors, state: of `loading.load_checkpoint`. llm: its frozen LLM; without one the checkpoint can be
            saved and pushed, and not distil. source: its name in messages.

    Attributes: `module`, the model.Distiller, variants.KeyValueDistiller or variants.FreeVectors, in eval
    mode (None without an LLM), and `state`, all that is known of its training.
    """

    def __init__(self, tensors: dict[str, Tensor], state: dict, llm: PreTrainedModel | None = None,
                 source: str = "the checkpoint"):
        if llm is not None:
            check_llm_config("the LLM", llm.config)
        self.state, self.llm, self.source = state, llm, source
        self.module: nn.Module | None = None if llm is None else restored(source, tensors, state, llm).eval()
        self.read: tuple | None = None  # the last tokenizer, given and ours
        kept = tensors if llm is None else {}
        self.tensors = {name: t for name, t in kept.items() if name.startswith("distiller.")}

    @classmethod
    def from_pretrained(cls, name: str | Path, *, llm: PreTrainedModel | None = None, **hub) -> "Distiller":
        """A folder of `save_pretrained`, a run's folder, a checkpoint file, or a name on the hub.

        Args:
            llm: the frozen LLM that it was trained for, in any float type, by transformers' from_pretrained.
            hub: revision, token, cache_dir, force_download, local_files_only of huggingface_hub.
        Raises:
            UserError: there is no such checkpoint; it is another LLM's, by name, sizes or hashes.
        """
        if Path(name).exists():
            return cls(*load_checkpoint(name), llm, str(name))
        try:
            return super().from_pretrained(str(name), llm=llm, **hub)
        except UserError:
            raise
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise UserError(f"{name} is no file or folder, and cannot be had from the hub "
                            f"({first_line(error)}); give another name") from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, llm: PreTrainedModel | None = None, **hub) -> "Distiller":
        return cls(*load_checkpoint(hf_hub_download(model_id, WEIGHTS, **hub)), llm, model_id)

    @torch.no_grad()
    def distill(self, tokenizer: PreTrainedTokenizerBase | str, examples: Sequence[dict[str, str]] = (),
                distill_len: int | None = None, context_len: int = 900, segments: int | str = 1) -> Tensor:
        """S_D of demonstrations, Sec. 3, in the template of the training.

        Args:
            tokenizer: the LLM's, or its name. examples: {"input": ..., "output": ...}, those that
                `context_len` tokens hold; none are needed by free vectors (PromptTuning).
            distill_len: l; None: as trained; less needs --elastic in the training. segments: S parts of D,
                distilled one by one, or auto.
        Returns:
            (S l, d) fp32 on the LLM's device, without a BOS; of kv:R (S (l - 1) + 1, W), variants.py.
        Raises:
            UserError: no LLM; another tokenizer; an example without input and output; no room.
        """
        check((self.module is not None, f"{self.source} was loaded without its LLM, without which it cannot "
               "distil; give that: from_pretrained(..., llm=...)"))
        model, module, llm = self.state["model"], self.module, self.llm
        module.distill_len = model["distill_len"]
        length = model["distill_len"] if distill_len is None else distill_len
        set_length(module, self.state, length, self.source)
        if isinstance(module, FreeVectors):
            return module.vectors[-module.distill_len:].detach().float()                     # (l, d)
        names = ("input", "output")
        texts = [{n: example.get(n) for n in names} if isinstance(example, dict) else {"input": None}
                 for example in examples]
        wrong = [text for text in texts if not all(isinstance(t, str) and t.strip() for t in text.values())]
        check((bool(texts), "no example is given; distill at least one"),
              (context_len >= 1 and (segments == "auto" or segments >= 1),
               "give 1 or more as context_len and as segments (or auto)"),
              (not wrong, f"an example needs texts as input and output, and {str(wrong[:1])[:200]} has not"))
        asked = SimpleNamespace(template=model["template"], context_len=context_len, segments=segments,
                                distill_len=module.distill_len)
        formatter = make_formatter(asked, self.tokenizer(tokenizer), llm, module)
        demos = [{"task": "examples", "options": []} | {name: t.strip() for name, t in text.items()}
                 for text in texts]
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(llm.dtype, "fp32")
        parts = formatter.parts(demos, formatter.limit(demos))
        vectors = distil(parts, module, llm.device, dtype, formatter.turns.head)[0].float()  # (S l, d)
        require_finite("a distilled vector", vectors)
        return vectors

    def writer(self, tokenizer: PreTrainedTokenizerBase | str, vectors: Tensor) -> Writer:
        """What answers queries after `vectors`: the LLM reads them here, once."""
        formatter = Formatter(self.tokenizer(tokenizer), self.state["model"]["template"], 0)
        return Writer(self.llm, formatter, vectors)

    @torch.no_grad()
    def export(self, kind: str, place: str | Path, tokenizer: PreTrainedTokenizerBase | str,
               vectors: Tensor) -> None:
        """Write vectors as `distill.py --export` does. kind: vllm, peft or kv."""
        check((kind in EXPORTS, f"no export is called {kind}; give {', '.join(EXPORTS)}"),
              (not Path(place).exists(), f"{place} is there already; give another name"))
        formatter = Formatter(self.tokenizer(tokenizer), self.state["model"]["template"], 0)
        about = {"llm": self.state["model"]["llm"], "template": self.state["model"]["template"]}
        EXPORTS[kind](Path(place), self.llm, formatter, vectors, [], about)

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase | str) -> Tokenizer:
        """Ours of the LLM's; UserError where it is not the one that the distiller was trained with."""
        if self.read is not None and self.read[0] is tokenizer:
            return self.read[1]
        ours, trained = Tokenizer(tokenizer), self.state["model"]["llm"].get("tokenizer_hash")
        check((trained in (None, ours.fingerprint), f"{self.source} was trained with a tokenizer of hash "
               f"{trained}, and {ours.name} has {ours.fingerprint}; give the LLM's own, as it was loaded"))
        self.read = tokenizer, ours
        return ours

    def _save_pretrained(self, save_directory: Path) -> None:
        """The three files; weights in bf16 where they all are numbers of bf16, else as they are."""
        state, tensors = published_state(self.state, self.source), self.tensors
        if self.module is not None:  # perhaps trained on since
            tensors = {f"distiller.{name}": t.detach() for name, t in self.module.state_dict().items()}
        halves = {name: t.to(torch.bfloat16) for name, t in tensors.items()}
        if all(torch.equal(halves[name].to(t.dtype), t) for name, t in tensors.items()):
            tensors = halves
        write_whole(save_directory / "config.json", json.dumps(state, indent=2) + "\n")
        if not (save_directory / "README.md").exists():
            write_whole(save_directory / "README.md", str(self.generate_model_card()))
        write_tensors(save_directory / WEIGHTS, {name: t.contiguous().cpu() for name, t in tensors.items()},
                      sealed("state", state))

    def generate_model_card(self, **more) -> ModelCard:
        """The card, filled in from the state; `more`: values for its template, as of `model_card_kwargs`."""
        known = published_state(self.state, self.source)
        name = "" if self.llm is None else self.llm.config._name_or_path
        on_hub = bool(name) and not Path(name).exists()
        base = name if on_hub else known["model"]["llm"]["name"]
        card = super().generate_model_card(**known | {"base": base} | more)
        if on_hub:
            card.data.base_model = name
        return card


def published_state(state: dict, source: str) -> dict:
    """What of a checkpoint's state is published: no optimiser, and nothing that names this machine's folders:
    of flags the numbers, of a distiller's folder its name."""
    def name_only(values: dict) -> dict:
        return {name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
                for name, value in values.items()}
    needed = ("trained_on", "commit", "step", "metrics")
    check((not {*needed, "model"} - state.keys(),
           f"{source} is not a whole checkpoint of this project; give a run's folder"))
    kept = {name: state[name] for name in needed}
    check_fields(source, "model", state["model"], "llm", "distiller", "distill_len", "template")
    backbone = state["model"].get("backbone")
    kept["model"] = name_only(state["model"]) | {"backbone": backbone and name_only(backbone)}
    kept["flags"] = {name: v for name, v in state.get("flags", {}).items() if type(v) in (int, float)}
    return kept


def publish(checkpoint: str | Path, folder: Path) -> Distiller:
    """Write a checkpoint's distiller as a folder, its weights rounded to bf16."""
    tensors, state = load_checkpoint(checkpoint)
    halves = {name: t.to(torch.bfloat16) for name, t in tensors.items()}
    made = Distiller(halves, state, source=str(checkpoint))
    try:
        made.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); give another place") from error
    return made
