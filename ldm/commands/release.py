"""``ldm release``: a synthetic data set, by any number of workers, resumed by the same command."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress

from ldm.applications.release import (
    Plan,
    Release,
    Session,
    audit_copy,
    bids_suffixes,
    check_model,
    check_volume_count,
    conditions_from,
    read_audit,
    read_evaluation,
)
from ldm.commands.run import plain
from ldm.commands.sample import load_model, sampling_options
from ldm.errors import LdmError
from ldm.model.latent_diffusion import LatentDiffusionModel

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> Session:
    """Release a data set, or this worker's part of it; returns what was done."""
    model, _ = load_model(config)
    check_model(model)
    plan, n = plan_of(config, model)
    out = Path(config.run_dir)
    with Progress() as bar:
        task = bar.add_task("releasing", total=n)
        worker = Release(
            plan,
            n,
            out,
            str(config.worker),
            config.encoders,
            config.stale_after,
            config.other_hardware,
            lambda count: bar.advance(task, count),
        )
        session = worker.run()
    logger.info(summary(session, n, out))
    return session


def plan_of(config: DictConfig, model: LatentDiffusionModel) -> tuple[Plan, int]:
    """What the configuration asks for, and how many volumes of it.

    Raises:
        LdmError: something is missing, illegal, or refused.
    """
    if config.license is None:
        raise LdmError("license is missing: under which terms may the data set be used? For example license=CC-BY-4.0.")
    if config.n is not None and config.repeats != 1:
        raise LdmError(f"n is {config.n} and repeats {config.repeats}: give one of them.")
    if config.n is not None:
        check_volume_count(config.n)
    sha256 = model.header["tensors_sha256"]
    sampling = vars(model.settings(sampling_options(config)))
    conditions = conditions_from(plain(config.covariates), model, config.n, config.batch_size, config.seed)
    audit = read_audit(config.audit, sha256, config.release_without_audit, sampling, conditions)
    n = len(conditions.rows) * config.repeats if config.n is None else config.n
    plan = Plan(
        model,
        conditions,
        str(config.name or model.header.get("cohort") or "release"),
        str(config.license),
        bids_suffixes(model.preprocessing.channels, plain(config.suffix), image_template(config, model)),
        audit,
        config.seed,
        config.batch_size,
        config.shard_size,
        config.precision,
        sampling_options(config),
        license_text(config.license_file),
        read_evaluation(config.evaluation, sha256, sampling),
        audit_copy(config.audit, sha256),
    )
    return plan, n


def image_template(config: DictConfig, model: LatentDiffusionModel) -> str | None:
    """Where the images of the model's cohort lie, if this is the configuration of that cohort."""
    template = None if OmegaConf.is_missing(config.data, "image") else config.data.image
    return template if isinstance(template, str) and config.data.name == model.header.get("cohort") else None


def license_text(path: str | None) -> str | None:
    """Text of a license.

    Raises:
        LdmError: there is no such file, or it is no text.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LdmError(f"license_file={path} cannot be read as text ({error}).") from error


def summary(session: Session, n: int, out: Path) -> str:
    """What was done, in words."""
    state = "complete" if session.complete else "not complete yet; other workers, or the same command, go on"
    done = f"{n} volumes, {state}: {out}"
    if not session.volumes:
        return done
    return (
        f"{done}\nThis worker: {session.volumes} volumes in {session.seconds:.0f} s, "
        f"{session.volumes_per_hour:.0f} an hour, "
        f"{100 * session.share_outside_network:.1f} % of the time outside the network."
    )
