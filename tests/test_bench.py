"""Tests of bench.py: counts against sums by hand, ways of reading against plain.py, the command line."""

import json

import pytest
import torch
from conftest import make_distiller
from sizes import LAYERS, LAYERS_S, T_D, T_X, WIDTH, WIDTH_S, L, V, attention, flops_by_hand, matrices

import bench
import plain
from common import UserError
from paper import figures, measure, speed


@pytest.mark.parametrize("all_logits", [True, False])
def test_flops_of_the_seven_methods_by_hand(tiny, all_logits):
    rows = bench.counted("gpt2-large", T_D, T_X, L, all_logits)

    def llm(tokens, seen):
        return matrices(WIDTH, LAYERS, tokens) + attention(WIDTH, LAYERS, tokens, seen)

    def head(tokens):
        return 2 * WIDTH * V * (tokens if all_logits else 1)

    distil = matrices(WIDTH_S, LAYERS_S, T_D + L) + attention(WIDTH_S, LAYERS_S, T_D + L, T_D + L)
    distil += 2 * WIDTH_S * WIDTH * L
    after_vectors = llm(L + T_X, L + T_X) + head(L + T_X)
    query = {"zero_shot": llm(T_X, T_X) + head(T_X), "icl": llm(T_D + T_X, T_D + T_X) + head(T_D + T_X),
             "icl_cached": llm(T_X, T_D + T_X) + head(T_X), "prompt_tuning": after_vectors,
             "mend": distil + after_vectors, "mend_vectors": after_vectors,
             "mend_kv": llm(T_X, L + T_X) + head(T_X)}
    prepare = {"zero_shot": 0, "icl": 0, "icl_cached": llm(T_D, T_D), "prompt_tuning": 0, "mend": 0,
               "mend_vectors": distil, "mend_kv": distil + llm(L, L)}
    assert {n: r["query_flops"] for n, r in rows.items()} == pytest.approx(query, rel=0.005)
    assert {n: r["prepare_flops"] for n, r in rows.items()} == pytest.approx(prepare, rel=0.005)


@pytest.mark.parametrize("name", ["gpt2-xl", "opt-6.7b"])
def test_the_formulas_by_hand_hold_to_two_percent(tiny, name):
    rows = bench.counted(name, T_D, T_X, L, True)
    with measure.no_weights():
        llm, distiller = measure.build_random(name, measure.PAIRS[name], L, torch.bfloat16)
        by_hand = flops_by_hand(llm.config, T_D, T_X, distiller.backbone.config, L)
    assert {n: rows[n]["query_flops"] for n in ("icl", "mend")} == pytest.approx(by_hand, rel=0.02)


def test_what_is_stored_and_the_memory_beside_it(tiny):
    """16 bit: two bytes a number; keys and values: 2 x layers x tokens x width."""
    rows = bench.counted("gpt2-large", T_D, T_X, L, True)
    kv = 2 * LAYERS * WIDTH * 2
    assert {n: r["stored_bytes"] for n, r in rows.items()} == {
        "zero_shot": 0, "icl": 4 * T_D, "icl_cached": kv * T_D, "mend": 4 * T_D, "mend_kv": kv * L,
        "prompt_tuning": L * WIDTH * 2, "mend_vectors": L * WIDTH * 2}
    llm_bytes = 2 * (12 * WIDTH ** 2 * LAYERS + 13 * WIDTH * LAYERS + 2 * WIDTH + (V + 1024) * WIDTH)
    distiller_bytes = 4 * (12 * WIDTH_S ** 2 * LAYERS_S + 13 * WIDTH_S * LAYERS_S + 2 * WIDTH_S + (V + 1024)
                           * WIDTH_S + L * WIDTH_S + (WIDTH_S + 1) * WIDTH)
    logits = 4 * V * (T_D + T_X)
    assert llm_bytes + logits < rows["icl"]["peak_bytes"] < llm_bytes + 4 * logits
    # what is stored, and the copy of it that reading a query makes
    more = rows["icl_cached"]["peak_bytes"] - rows["mend_kv"]["peak_bytes"]
    assert more == pytest.approx(2 * kv * (T_D - L), rel=0.2)
    assert rows["mend"]["peak_bytes"] > llm_bytes + distiller_bytes > rows["mend_vectors"]["peak_bytes"]


def test_counting_needs_no_weights(tiny):
    """The same figures from tensors with data."""
    with measure.no_weights():
        llm, distiller = measure.build_random("gpt2-large", "gpt2", L, torch.float32)
        without = bench.count_methods(llm, distiller, T_D, T_X, "fp32", True)
    llm, distiller = measure.build_random("gpt2-large", "gpt2", L, torch.float32)
    assert bench.count_methods(llm, distiller, T_D, T_X, "fp32", True) == without


def test_all_ways_of_reading_give_the_plain_logits(llm):
    distiller = make_distiller(llm, distill_len=L)
    ids = torch.randint(0, llm.config.vocab_size, (1, T_D + T_X), generator=torch.Generator().manual_seed(0))
    demo, query = ids[:, :T_D], ids[:, T_D:]
    with torch.no_grad():
        logits, last = ({name: read(prepare()) for name, (prepare, read) in
                         bench.methods(llm, distiller, demo, query, "fp32", every).items()}
                        for every in (True, False))
        prefixes = {"icl": plain.embed(llm, demo[0].tolist()),
                    "mend": plain.Distiller.forward(distiller, demo[0].tolist()),
                    "zero_shot": plain.embed(llm, []),
                    "prompt_tuning": plain.embed(llm, [demo[0, 0].item()] * L)}
        # the last of the logits are the prediction after the query: the token there does not matter
        plain_logits = {name: plain.read(llm, prefix, query[0].tolist(), [0])
                        for name, prefix in prefixes.items()}
    for name in bench.METHODS:
        expected = plain_logits[{"icl_cached": "icl", "mend_vectors": "mend",
                                 "mend_kv": "mend"}.get(name, name)]
        n = min(len(expected), len(logits[name]), T_X)
        torch.testing.assert_close(logits[name][-n:], expected[-n:], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(last[name], expected[-1:], atol=2e-4, rtol=1e-3)
    assert len(logits["icl"]) == T_D + T_X and len(logits["mend"]) == L + T_X


def test_pays_off_after():
    """Distilling costs 100 and saves 40 a query; cached ICL costs 300 at first; a dearer one never pays."""
    assert bench.pays_off_after(100, 60, 0, 100) == 2.5
    assert bench.pays_off_after(100, 60, 300, 65) == 0
    assert bench.pays_off_after(100, 60, 0, 60) is None and bench.pays_off_after(100, 60, 0, 50) is None
    rows = {"mend_vectors": (100, 60), "mend_kv": (110, 40), "icl": (0, 100), "icl_cached": (90, 44)}
    rows = {n: {"prepare_flops": p, "query_flops": q} for n, (p, q) in rows.items()}
    assert bench.pay_off(rows) == {"mend_vectors against icl": 2.5, "mend_vectors against icl_cached": None,
                                   "mend_kv against icl": 110 / 60, "mend_kv against icl_cached": 5}


def test_crossing():
    assert bench.crossing([0, 10, 20], [0, 10, 20], [15, 15, 15]) == 15
    assert bench.crossing([0, 10], [5, 6], [7, 6]) == 10
    assert bench.crossing([0, 10], [1, 2], [3, 4]) is None and bench.crossing([0, 10], [1, 2], [1, 2]) is None


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_here(flags, capsys):
    found = bench.main([*flags, "--demo-tokens", "20", "--query-tokens", "6", "--repeats", "2"])
    assert last_line(capsys) == found and list(found["rows"]) == list(bench.METHODS)
    for row in found["rows"].values():
        low, high = row["seconds_range"]
        assert 0 < low <= row["seconds"] <= high


@pytest.mark.slow
def test_here_measures_memory_in_children(flags, tiny):
    found = bench.main([*flags, "--demo-tokens", "20", "--query-tokens", "6", "--repeats", "1", "--memory"])
    assert all(r["measured_peak_bytes"] > 5e7 for r in found["rows"].values())


def test_fig3_and_its_pictures(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CONTEXTS", {"class_to_class": 30, "qa_to_qa": 50})
    monkeypatch.setattr(bench, "SCALING", {"demo_tokens": (2, 8), "distill_len": (5, 200)})
    monkeypatch.setattr(bench, "PAIRS", {"gpt2-xl": "gpt2"})
    flags = ["--preset", "paper", "--device", "cpu", "--dtype", "fp32", "--distill-len", "5",
             "--query-tokens", "9"]
    final = bench.main(["--fig3", *flags, "--repeats", "1", "--out", str(tmp_path / "fig3.json")])
    assert last_line(capsys) == final and "settings" not in final and final["icl_over_mend_seconds"][1] > 0
    saved = json.loads((tmp_path / "fig3.json").read_text())
    assert len(saved["settings"]) == 2 and len(saved["scaling"]) == 1 and len(saved["measured"]) == 2
    rows = next(s["rows"] for s in saved["settings"] if (s["llm"], s["demo_tokens"]) == ("gpt2-xl", 50))
    assert rows == bench.counted("gpt2-xl", 50, 9, 5, True)
    ratio = rows["icl"]["query_flops"] / rows["mend"]["query_flops"]
    assert saved["icl_over_mend_flops"]["gpt2-xl"][1] == ratio
    (scaling,) = saved["scaling"]
    # 900 + 200: too long
    assert scaling["demo_tokens"]["x"] == [2, 8, 1024 - 9] and scaling["distill_len"]["x"] == [5]
    last = bench.counted("gpt2-xl", 1024 - 9, 9, 5, False, ["mend"])
    assert scaling["demo_tokens"]["flops"]["mend"][2] == last["mend"]["query_flops"]
    at = scaling["demo_tokens"]["crossings"]
    assert at["icl_cached and mend_kv"] == pytest.approx(5) and 5 < at["icl and mend"] < 8
    for name in ("fig3", "scaling"):
        drawn = figures.main([name, "--results", str(tmp_path / "fig3.json"), "--out", str(tmp_path)])
        assert drawn["files"] == [str(tmp_path / f"{name}{kind}") for kind in (".png", ".svg")]
    assert drawn["drawn"]["gpt2-xl"]["demo_tokens"] == at
    assert (tmp_path / "fig3.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "scaling.svg").read_text()


def test_suite_states_every_ratio(flags, tiny, tmp_path, monkeypatch, capsys):
    loss = {"ratio": 3.0, "bytes": {"plain": 3e6, "chunked": 1e6}, "tokens": 1024,
            "gradient_difference": 1e-7}
    monkeypatch.setattr(speed, "loss_memory", lambda: loss)
    scoring = speed.scoring_speed
    monkeypatch.setattr(speed, "scoring_speed", lambda *a, **k: scoring(*a, **k, n=12, n_plain=2, options=3))
    monkeypatch.setattr(speed, "SQUARE", 64)
    monkeypatch.setattr(speed, "thread_settings", lambda *_: [
        {"threads": 1, "GOMP_SPINCOUNT": "100", "seconds": 1.0}])
    final = bench.main(["--suite", *flags, "--k", "4", "--repeats", "1", "--out",
                        str(tmp_path / "bench.json")])
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert {"scoring_cached_over_plain", "training_q4_over_plain", "loss_memory_plain_over_chunked",
            "flops_icl_over_mend_gpt2_large", "flops_icl_over_mend_gpt2_xl",
            "training_share_of_matmul_rate"} <= saved["ratios"].keys() == final["ratios"].keys()
    assert saved["commit"] and saved["machine"] and saved["command"].startswith("python bench.py --suite")
    rows = saved["details"]["methods_gpt2-xl"]
    ratio = rows["icl"]["query_flops"] / rows["mend"]["query_flops"]
    assert saved["ratios"]["flops_icl_over_mend_gpt2_xl"] == ratio
    details = saved["details"]
    assert saved["ratios"]["scoring_cached_over_plain"] == min(
        details["scoring"][m]["ratio"] for m in ("icl", "mend"))
    assert details["training_gpt2_large_bf16"]["sets"] == 1 and details["training_smollm2_fp32"]["sets"] == 2
    row = "| loss memory plain over chunked | 3.00 | 4.00, missed | 1 against 3 MB"
    assert row in capsys.readouterr().out


def test_flag_faults(flags, tiny):
    with pytest.raises(UserError,
                       match=r"--demo-tokens is 0.*--query-tokens is 2.*--repeats is 0.*exclude each other"):
        bench.main([*flags, "--demo-tokens", "0", "--query-tokens", "2", "--repeats", "0", "--random-init",
                    "--checkpoint", "x"])
    with pytest.raises(UserError, match="passes the 2048 tokens"):
        bench.main([*flags, "--demo-tokens", "2045", "--repeats", "1"])
    with pytest.raises(UserError, match="free vectors have none"):
        bench.main([*flags, "--distiller", "free", "--repeats", "1"])
    with pytest.raises(UserError, match="t5-large-lm-adapt is an encoder-decoder"):
        bench.main([*flags, "--llm", "t5-large-lm-adapt", "--distiller", "t5-small-lm-adapt",
                    "--random-init"])
    with pytest.raises(UserError, match="make it with `python bench.py"):
        figures.main(["fig3", "--results", "nowhere.json"])
