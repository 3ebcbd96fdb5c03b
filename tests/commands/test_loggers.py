"""What the verbs share."""

from omegaconf import OmegaConf

from ldm.commands import stages


def test_all_sessions_of_a_run_are_one_run_of_weights_and_biases(tmp_path, monkeypatch):
    built = []

    class Logger:
        def log_hyperparams(self, values):
            pass

    monkeypatch.setattr(stages, "build", lambda section, where: built.append(dict(section)) or Logger())
    wandb = {"_target_": "pytorch_lightning.loggers.WandbLogger", "project": "ldm"}
    csv = {"_target_": "pytorch_lightning.loggers.CSVLogger"}
    for folder in ("a", "a", "b"):
        config = OmegaConf.create(
            {"run_dir": str(tmp_path / folder), "logger": {"extra": {"wandb": wandb, "csv": csv}}}
        )
        stages.loggers(config)
    first, again, other = built[::2]
    assert first["id"] == again["id"] != other["id"]
    assert first["resume"] == "allow"
    assert "id" not in built[1]
