"""What a fit, and ``compress`` without one, show and log."""

from __future__ import annotations

import importlib.util
import logging
import re

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from tiny import causal_model, causal_module, feature_loader, mlp, token_loader

from fasc_lightning import CompressionReport, FascCallback, compress, recover, score

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*saw fewer tokens than they have features"),
    pytest.mark.filterwarnings("ignore:.*lowered the held-out loss"),
]

QUICK = {"keep": 0.8, "refit": False, "allocation": "fisher"}


@pytest.fixture
def shown(caplog, capsys):
    """Return what has been shown so far, on the terminal and by loggers."""
    caplog.set_level(logging.INFO)

    def read():
        captured = capsys.readouterr()
        return captured.out + captured.err + caplog.text

    return read


def test_compress_prints_its_report_once_and_names_no_callback(shown):
    report = compress(causal_model(), token_loader(samples=16), **QUICK)
    text = shown()
    assert "FascCallback" not in text
    assert "Epoch" not in text
    assert "Calibration" in text
    assert "Factorising" in text
    assert text.count(str(report)) == text.count("Not saved yet: save_compressed(model, folder).") > 0
    assert len(re.findall("parameters kept", text)) == text.count(str(report))


def test_score_and_recover_name_no_callback_and_no_epoch(shown):
    model = causal_model()
    score(model, list(token_loader(samples=16)), progress=True)
    compress(model, token_loader(samples=16), **QUICK, progress=False)
    recover(model, token_loader(samples=16), "factors")
    text = shown()
    assert "FascCallback" not in text
    assert "Epoch" not in text
    assert "Scoring" in text
    assert "Recovery" in text


def test_nothing_is_shown_without_progress(shown):
    compress(causal_model(), token_loader(samples=16), **QUICK, progress=False)
    assert shown() == ""


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_layers_have_the_trainers_own_bar(make_trainer, shown, bar, monkeypatch):
    used = []
    monkeypatch.setattr("fasc_lightning._utils._progress.Tqdm", lambda names, **kw: used.append(kw["desc"]) or names)
    trainer = make_trainer(FascCallback(**QUICK, update_weights=False), bar(), enable_progress_bar=True)
    trainer.fit(causal_module(), token_loader())
    assert used == ([] if bar is RichProgressBar else ["Factorising", "Building"])
    assert "Factorising" in shown() + "".join(used)


def test_a_fit_ends_with_the_report_and_the_way_to_save(make_trainer, shown):
    callback = FascCallback(**QUICK, update_weights=False)
    make_trainer(callback).fit(causal_module(), token_loader())
    text = shown()
    assert text.count(str(callback.report)) >= 1
    assert text.rstrip().endswith("Not saved yet: save_compressed(model, folder), or trainer.save_checkpoint(file).")


def test_small_amounts_have_units_of_their_own(make_trainer, shown):
    callback = FascCallback(**QUICK, update_weights=False)
    make_trainer(callback).fit(causal_module(), token_loader())
    assert "0.00 GB" not in shown()
    assert re.search(r"targeted layers: .* [\d.]+ kB -> [\d.]+ kB, [\d.]+ kFLOPs", str(callback.report))


def test_the_report_has_the_loss_on_validation_batches(make_trainer):
    callback = FascCallback(rank=4, refit=False)
    module = causal_module()
    trainer = make_trainer(callback, limit_val_batches=5)
    trainer.fit(module, token_loader(samples=16), token_loader(samples=40, seed=1))
    validation = callback.report.validation
    assert validation["batches"] == 5
    assert validation["loss"]["after"] > validation["loss"]["before"]
    trainer.validate(module, token_loader(samples=40, seed=1), verbose=False)
    assert validation["loss"]["after"] == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-4)
    assert "validation loss" in str(callback.report)
    again = CompressionReport.from_dict(callback.report.to_dict())
    assert again.validation == validation


def test_at_most_eight_validation_batches_are_measured(make_trainer):
    callback = FascCallback(**QUICK)
    make_trainer(callback).fit(causal_module(), token_loader(), token_loader(samples=40))
    assert callback.report.validation["batches"] == 8


def test_a_validation_that_cannot_be_measured_does_not_end_the_fit(make_trainer, caplog):
    module = mlp()
    module.validation_step = lambda batch, batch_idx: None
    callback = FascCallback(**QUICK)
    with caplog.at_level("INFO"):
        make_trainer(callback, num_sanity_val_steps=0).fit(module, feature_loader(), feature_loader(shape=(5,)))
    assert callback.report.validation is None
    assert "the validation loss is not measured" in caplog.text


def test_no_validation_loader_no_validation_loss(make_trainer):
    callback = FascCallback(**QUICK)
    make_trainer(callback).fit(causal_module(), token_loader())
    assert callback.report.validation is None
    assert "validation loss" not in str(callback.report)


def test_figures_of_layers_can_be_left_out_of_the_logs(make_trainer, tmp_path):
    callback = FascCallback(**QUICK, monitor=2, log_layers=False)
    logger = CSVLogger(tmp_path, "run")
    trainer = make_trainer(callback, logger=logger, log_every_n_steps=1)
    trainer.fit(causal_module(), token_loader(samples=16))
    text = (tmp_path / "run" / "version_0" / "metrics.csv").read_text()
    assert "fasc/rho_mean" in text
    assert "fasc/kept" in text
    assert "up_proj" not in text
    assert callback.rho_history.layers
    assert "log_layers" not in callback.report.options
    assert any(name.startswith("rho/") for name in trainer.callback_metrics)  # for ModelCheckpoint(monitor=...)


def test_a_checkpoint_writes_the_history_of_rho(make_trainer, tmp_path):
    class Killed(FascCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                written.append((tmp_path / "run" / "version_0" / "rho_history.csv").read_text())
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "now.ckpt")

    written = []
    make_trainer(Killed(monitor=2), logger=CSVLogger(tmp_path, "run")).fit(causal_module(), token_loader(samples=16))
    steps = {line.split(",")[0] for line in written[0].splitlines()[1:]}
    assert steps == {"0", "2", "4"}


def test_missing_matplotlib_is_named_in_one_line(make_trainer, tmp_path, monkeypatch, caplog):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with caplog.at_level("INFO"):
        trainer = make_trainer(FascCallback(monitor=2), logger=CSVLogger(tmp_path, "run"))
        trainer.fit(causal_module(), token_loader())
    lines = [record.getMessage() for record in caplog.records if "matplotlib" in record.getMessage()]
    assert lines == ["No figures of rho without matplotlib: pip install 'fasc-lightning[plot]'"]


def test_a_module_without_blocks_is_not_told_what_to_do(make_trainer, caplog):
    with caplog.at_level("INFO"):
        make_trainer(FascCallback(keep=0.9, update_weights=False)).fit(mlp(), feature_loader())
    assert "FascCallback: not refitted (harmless): the module has no blocks." in caplog.text
