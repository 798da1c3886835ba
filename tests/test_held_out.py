"""Tests of held_out.py's command; what it computes is tested beside the losses, in test_score.py."""

import pytest

import paper.held_out
import train_pretrain
from common import UserError


def test_held_out_text_of_a_checkpoint_is_what_training_saw(flags, corpus_dir, tmp_path):
    text = ["--corpus", str(corpus_dir), "--window", "32", "--min-doc-len", "32", "--eval-docs", "3"]
    trained = train_pretrain.main([*flags, *text, "--steps", "1", "--batch-size", "2", "--k", "4",
                                   "--out-dir", str(tmp_path)])
    given = [*flags[:flags.index("--distiller")], "--checkpoint", str(tmp_path), "--device", "cpu"]
    found = paper.held_out.main([*given, *text])
    assert found["distill_len"] == 4 and found["heldout_kl"] == pytest.approx(trained["heldout_kl"], rel=1e-4)
    many = paper.held_out.main([*given, *text, "--eval-docs", "64"])  # of 60 documents each 20th is held out
    assert found["windows"] == many["windows"] == 3 and many["heldout_kl"] == found["heldout_kl"]
    with pytest.raises(UserError, match="--window 2049 makes 2049 tokens, and the LLM reads at most 2048"):
        paper.held_out.main([*given, *text, "--window", "2049"])
    with pytest.raises(UserError, match="makes 2049 tokens, and the distiller reads at most 2048"):
        paper.held_out.main([*given, *text, "--window", "2045", "--beta", "0.9999"])
    with pytest.raises(UserError, match="--beta is 2.0"):
        paper.held_out.main([*given, *text, "--beta", "2"])
