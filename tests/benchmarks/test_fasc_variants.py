"""The benchmark from its options to its tables, on a model made in a moment."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import fasc_variants
import pytest
import torch
from fasc_variants import VARIANTS, Bench, Variant, main, make_bench, mean_matrix, needed_statistics, parse
from tiny import byte_tokenizer, causal_model
from variant_statistics import Statistics
from variant_tables import markdown, result_rows, verdict

from fasc_lightning.compression import compress_layers
from fasc_lightning.evaluation import PairedInterval, perplexity, token_losses
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, swap_modules
from fasc_lightning.refit import refit
from fasc_lightning.solvers import solver_needs
from fasc_lightning.statistics import CalibrationMoments
from fasc_lightning.studies.rho import backward_windows

FEW = [
    "fasc",
    "root-half",
    "staged-0.6-half",
    "losses-heldout",
    "losses-measured-root",
    "choose-by-heldout",
    "windows-16",
    "refit",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model folder whose layers matter to its losses, and texts in which no window comes twice."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = byte_tokenizer()
    causal_model(vocab_size=len(tokenizer), initializer_range=0.3).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    files = {*fasc_variants.CALIBRATION, *(file for file, _ in fasc_variants.JUDGES.values())}
    for i, file in enumerate(sorted(files)):
        letters = random.Random(i)
        words = ("".join(letters.choices("abcdefgh", k=letters.randint(2, 7))) for _ in range(1500))
        (folder / file).write_text(" ".join(words))
    return folder


@pytest.fixture
def options(data, tmp_path, monkeypatch):
    monkeypatch.setenv("FASC_DATA", str(data))
    sizes = ["--windows", "12", "--window", "16", "--judge-windows", "3"]
    return ["--model", str(data / "model"), *sizes, "--output", str(tmp_path / "out"), "--variants"]


@pytest.fixture
def bench(options, data):
    return make_bench(parse([*options, "fasc"]), data)


def cells(options):
    folder = Path(options[options.index("--output") + 1]) / "cells"
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.iterdir())}


def test_every_named_variant_is_measured_beside_plain_and_put_into_the_tables(options, tmp_path, capsys):
    main([*options, *FEW])
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["keep"]) for row in rows] == [
        (name, keep) for keep in ("0.8", "0.6") for name in ("plain", *FEW)
    ]
    for row in rows:
        assert float(row["keep"]) - 0.05 < float(row["kept"]) <= float(row["keep"])
        assert float(row["squad against plain low"]) <= float(row["squad against plain"])
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.count("| refit |") == 4  # two budgets, two references
    assert text in capsys.readouterr().out
    kept = cells(options)
    assert kept["refit-0.6"]["refit"]["batches"] == {"fit": 10, "held": 2}
    assert kept["losses-heldout-0.6"]["perplexity"] != kept["fasc-0.6"]["perplexity"]


def test_plain_and_fasc_are_the_solvers_of_the_package(bench):
    windows = bench.statistics.windows
    for name, method in (("plain", "fasc-plain"), ("fasc", "fasc")):
        found = next(bench.run(name, VARIANTS[name], [0.6]))
        moments = CalibrationMoments(layer_shapes(bench.layers), needs=solver_needs(method))
        for _ in backward_windows(bench.model, Taps(bench.layers, moments), windows):
            pass
        result = compress_layers(bench.layers, moments, keep=0.6, method=method, layout="pivot")
        replaced = swap_modules(bench.model, result.replacements)
        for text, judge in bench.judges.items():
            assert found["perplexity"][text] == pytest.approx(perplexity(bench.model, judge), rel=1e-4)
        swap_modules(bench.model, replaced)


def test_what_is_judged_is_the_refitted_model(bench, monkeypatch):
    refits = []

    def refit_and_break(model, dense, gradients, batches, *, inputs, options):
        report = refit(model, dense, gradients, batches, inputs=inputs, options=options)
        for name, G in gradients.items():
            torch.testing.assert_close(G, bench.statistics.pair("coupled", name)[1])
            torch.testing.assert_close(inputs[name], bench.statistics.pair("coupled", name)[0])
            for parameter in model.get_submodule(name).parameters():
                parameter.zero_()
        refits.append((options, [batch["input_ids"] for batch in batches]))
        return report

    monkeypatch.setattr(fasc_variants, "refit", refit_and_break)
    found = next(bench.run("refit-lambda-3", VARIANTS["refit-lambda-3"], [0.6]))
    ((options, batches),) = refits
    assert options.anchors == (3.0,)
    assert torch.equal(torch.cat(batches), bench.statistics.windows)
    assert found["losses"] != next(bench.run("fasc", VARIANTS["fasc"], [0.6]))["losses"]


def test_the_model_is_dense_again_after_every_variant(bench):
    before = token_losses(bench.model, bench.judges["news"])
    for name in ("staged-0.8-only-G", "refit"):
        list(bench.run(name, VARIANTS[name], [0.6]))
        assert all(bench.model.get_submodule(layer) is module for layer, module in bench.layers.items())
    assert torch.equal(token_losses(bench.model, bench.judges["news"]), before)


def test_a_run_that_was_stopped_goes_on_where_it_was(options, monkeypatch):
    save = Bench._save
    saved = []

    def stops(self, path, *rest):
        if len(saved) == 4:  # dense, plain twice, fasc once
            raise KeyboardInterrupt
        saved.append(path.stem)
        return save(self, path, *rest)

    monkeypatch.setattr(Bench, "_save", stops)
    with pytest.raises(KeyboardInterrupt):
        main([*options, "fasc"])
    assert saved == ["dense", "plain-0.8", "plain-0.6", "fasc-0.8"]
    first = cells(options)
    monkeypatch.setattr(Bench, "_save", lambda self, path, *rest: saved.append(path.stem) or save(self, path, *rest))
    monkeypatch.setattr(Statistics, "_save", lambda *_: pytest.fail("statistics were gathered again"))
    main([*options, "fasc"])
    assert saved[4:] == ["fasc-0.6"]
    assert all(cells(options)[name] == cell for name, cell in first.items())
    main([*options, "fasc"])
    assert len(saved) == 5


def test_other_options_are_other_cells(options):
    main([*options, "plain", "--keep", "0.6"])
    first = cells(options)["plain-0.6"]
    main([*options, "plain", "--keep", "0.6", "--seed", "1"])
    assert cells(options)["plain-0.6"]["source"] != first["source"]
    assert cells(options)["plain-0.6"]["losses"] != first["losses"]


def test_a_variant_that_was_changed_is_measured_again(bench):
    first = next(bench.run("fasc", Variant(), [0.6]))
    again = next(bench.run("fasc", Variant(shrink_gradients=0.5), [0.6]))
    assert again["losses"] != first["losses"]


def test_what_judges_was_never_calibrated_on(bench):
    calibrated = [*bench.statistics.windows, *bench.statistics.nested, *bench.heldout]
    known = {tuple(ids.tolist()) for ids in calibrated}
    assert len(bench.heldout) == fasc_variants.HELDOUT_WINDOWS
    assert not known & {tuple(ids.tolist()) for judge in bench.judges.values() for ids in judge}
    fitted = {tuple(ids.tolist()) for ids in bench.statistics.windows}
    assert not fitted & {tuple(ids.tolist()) for ids in bench.heldout}
    with pytest.raises(SystemExit):
        parse(["--windows", "877"])


def test_heldout_ratios_scale_the_losses_of_their_layers(bench, monkeypatch):
    bench.prepare([Variant(heldout=0.5)])
    factorizations = bench.factorize(Variant())
    first, second, *others = bench.layers
    J = {first: {"fasc": 8.0, "plain": 1.0, "predicted": 2.0}, second: {"fasc": 9.0, "plain": 10.0, "predicted": 1.0}}
    monkeypatch.setattr(bench, "exact_losses", lambda keep, label, windows: J)
    _, losses = bench.losses(Variant(heldout=0.5), factorizations, 0.6)
    for name, factor in ((first, 2.0), (second, 3.0), (others[0], 6.5**0.5)):
        torch.testing.assert_close(losses[name], factor * factorizations[name].losses)
    _, losses = bench.losses(Variant(power=0.8), factorizations, 0.6)
    torch.testing.assert_close(losses[first], factorizations[first].losses ** 0.8)


def test_a_layer_goes_to_plain_where_heldout_tokens_prefer_it(bench, monkeypatch):
    bench.prepare([Variant(choose=True)])
    factorizations, plain = bench.factorize(Variant()), bench.factorize(VARIANTS["plain"])
    first, second, *_ = bench.layers
    J = {first: {"fasc": 2.0, "plain": 1.0, "predicted": 1.0}, second: {"fasc": 1.0, "plain": 2.0, "predicted": 1.0}}
    monkeypatch.setattr(bench, "exact_losses", lambda keep, label, windows: J)
    chosen, losses = bench.losses(Variant(choose=True), factorizations, 0.6)
    assert torch.equal(chosen[first].left, plain[first].left)
    assert chosen[second] is factorizations[second]
    # In the metric of fasc, no factors lose less than its own.
    least = factorizations[first].losses
    assert (losses[first] >= least * (1 - 1e-4) - 1e-6 * least[0]).all()
    assert losses[first][0] == pytest.approx(factorizations[first].losses[0].item(), rel=1e-4)


def test_heldout_losses_are_measured_at_the_ranks_of_the_budget(bench):
    bench.prepare([Variant(choose=True)])
    found = bench.exact_losses(0.6, "heldout", bench.heldout)
    factorizations = bench.factorize(Variant())
    ranks = bench.ranks({name: f.losses for name, f in factorizations.items()}, 0.6)
    assert set(found) == {name for name, k in ranks.items() if k is not None}
    for name, J in found.items():
        assert J["predicted"] == pytest.approx(factorizations[name].losses[ranks[name]].item())
        assert J["fasc"] > 0
        assert J["plain"] > 0
    assert bench.exact_losses(0.6, "heldout", bench.heldout) == found


def test_statistics_that_are_averaged_may_be_brought_to_one_trace():
    first, second = torch.diag(torch.tensor([2.0, 4.0])), torch.diag(torch.tensor([3.0, 0.0]))
    assert mean_matrix([first, second], matched=False).diagonal().tolist() == [2.5, 2.0]
    assert mean_matrix([first, second], matched=True).diagonal().tolist() == [4.0, 2.0]
    assert mean_matrix([first], matched=True).equal(first.double())


def test_variants_ask_for_what_they_read():
    assert needed_statistics(VARIANTS["plain"]) == ["plain"]
    assert needed_statistics(VARIANTS["sample-half"]) == ["plain", "sample"]
    assert set(needed_statistics(VARIANTS["staged-0.8"])) == {"staged-0.8", "coupled"}
    assert set(needed_statistics(VARIANTS["choose-by-heldout"])) == {"plain", "coupled"}


def interval(low, high):
    return PairedInterval((low + high) / 2, low, high, 0.95, 16)


def test_a_variant_helps_on_all_texts_and_hurts_on_any():
    better, worse, open_ = interval(0.9, 0.99), interval(1.01, 1.1), interval(0.99, 1.01)
    assert verdict([better, better]) == "helps"
    assert verdict([better, open_]) == "tie"
    assert verdict([open_, open_]) == "tie"
    assert verdict([better, worse]) == "hurts"
    assert verdict([open_, worse]) == "hurts"


def cell(variant, shift, noise=0.0):
    """Made-up losses of 16 windows, shifted all alike or with noise."""
    generator = torch.Generator().manual_seed(0)
    base = 3 + torch.rand(2, 16, generator=generator)
    losses = base + shift + noise * torch.randn(2, 16, generator=generator)
    texts = dict(zip(("squad", "news"), losses.tolist(), strict=True))
    figures = {text: float(values.mean().exp()) for text, values in zip(texts, losses, strict=True)}
    return {"variant": variant, "keep": 0.6, "kept": 0.6, "perplexity": figures, "losses": texts, "seconds": {}}


def test_changes_are_paired_by_window():
    plain = cell("plain", 0.0)
    rows = result_rows([plain, cell("better", -0.01), cell("noisy", 0.001, 0.1)])
    assert [row["verdict against plain"] for row in rows] == ["reference", "helps", "tie"]
    # One shift of all windows has no spread, however much the windows differ.
    better = rows[1]
    for end in ("", " low", " high"):
        assert better[f"squad against plain{end}"] == pytest.approx(0.99005, abs=1e-5)
    text = markdown(rows, plain)
    assert "-1.0 % [-1.0, -1.0]" in text
    assert "against fasc" not in text  # which was not measured


def test_a_folder_without_the_texts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FASC_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"Expected FASC_DATA .* without calib_wikitext2_train.txt"):
        main(["--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
