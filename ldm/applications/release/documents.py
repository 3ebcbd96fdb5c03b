"""What stands beside the volumes: BIDS metadata, tables, README, model card, provenance. All of it is deterministic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm import __version__
from ldm.applications.release.files import as_json, as_tsv
from ldm.applications.release.plan import Plan
from ldm.data.schema import Covariate
from ldm.evaluation.goals import number

BIDS_VERSION = "1.10.0"
VOLUMES = "provenance.tsv"
COLUMNS = ("participant_id", "index", "seed", "file", "bytes", "sha256", "environment")
NOT_BIDS = (VOLUMES, "SHA256SUMS", "LICENSE")  # of a shard's files, for .bidsignore
SYNTHETIC = "Every image of this data set is synthetic: drawn by a latent diffusion model, not a scan of a person."
PRIVACY = (
    "No formal guarantee of privacy is given: a generative model can reproduce images, or parts of images, that it was "
    "trained on, and no audit can rule that out."
)
USE = """\
## Intended use

Development and test of software, teaching, and research on methods where synthetic images are known to be what is
wanted.

## Not intended

* Diagnosis, or any other decision about a person.
* Evidence about a population: frequencies and effects are those of a model, not of patients.
* Validation of a method in place of real images.

## Limits

* The covariates in `participants.tsv` are what the model was asked for. A synthetic image need not show them.
* The model knows what its training cohort held; its gaps and its biases are in the synthetic images too.
* Asked beyond the range of the training covariates, the model extrapolates.
"""


def shard_documents(plan: Plan, shard: int, volumes: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Files of a shard beside its volumes: name -> content. Nothing in them depends on how many shards there are.

    Args:
        plan: of the release.
        shard: its number.
        volumes: one mapping a file, with :data:`COLUMNS`.
    """
    people = {volume["participant_id"]: volume["index"] for volume in volumes}  # several channels are one participant
    names = plan.model.schema.names
    rows = [[who, *(plan.conditions.at(i).get(name) for name in names), "yes"] for who, i in people.items()]
    return {
        "dataset_description.json": as_json(_description(plan, f"shard {shard}")),
        "participants.tsv": as_tsv(["participant_id", *names, "synthetic"], rows),
        "participants.json": as_json(_columns(plan)),
        **{f"{suffix}.json": as_json(_sidecar(plan, channel)) for channel, suffix in plan.suffixes.items()},
        VOLUMES: as_tsv(COLUMNS, [[volume[column] for column in COLUMNS] for volume in volumes]),
        "README": _shard_readme(plan, shard),
        ".bidsignore": "".join(f"{name}\n" for name in NOT_BIDS).encode(),
        **license_file(plan),
    }


def license_file(plan: Plan) -> dict[str, bytes]:
    """``LICENSE``, where its text was given."""
    return {} if plan.license_text is None else {"LICENSE": plan.license_text.encode()}


def _description(plan: Plan, part: str) -> dict[str, Any]:
    # "raw" although no scanner made them: the files are named as images are, which a BIDS derivative's may not be,
    # and tools find them without being told more. GeneratedBy says where they come from.
    sha = plan.model.header["tensors_sha256"]
    return {
        "Name": f"{plan.name} (synthetic), {part}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "raw",
        "License": plan.license,
        "GeneratedBy": [
            {
                "Name": "ldm release",
                "Version": __version__,
                "Description": f"Synthetic images, drawn by the latent diffusion model with tensors of SHA-256 {sha}",
            }
        ],
    }


def _columns(plan: Plan) -> dict[str, Any]:
    return {
        "participant_id": {"Description": "Number of a synthetic image; no person stands behind it"},
        **{covariate.name: _column(covariate) for covariate in plan.model.schema},
        "synthetic": {"Description": "Whether the image is synthetic", "Levels": {"yes": "drawn by a model"}},
    }


def _column(covariate: Covariate) -> dict[str, Any]:
    about: dict[str, Any] = {"Description": f"{covariate.name} that the synthetic image was asked to show"}
    if covariate.unit:
        about["Units"] = covariate.unit
    if covariate.levels:
        about["Levels"] = {level: f"{covariate.name} is {level}" for level in covariate.levels}
    return about


def _sidecar(plan: Plan, channel: str) -> dict[str, Any]:
    """Metadata of all images with a suffix, by BIDS's inheritance principle."""
    return {
        "Description": f"Synthetic image ({channel}), drawn by a latent diffusion model; not a scan of a person",
        "Synthetic": True,
        "ModelSHA256": plan.model.header["tensors_sha256"],
    }


def _shard_readme(plan: Plan, shard: int) -> bytes:
    return f"""\
{plan.name} (synthetic), shard {shard}

{SYNTHETIC}
{PRIVACY}

This folder is a BIDS data set by itself, and one shard of a larger release. Participant numbers are unique in the whole
release, so shards can be joined. participants.tsv holds what each synthetic image was asked to show, {VOLUMES} the
seed and number that fix its noise, SHA256SUMS a checksum of every file (sha256sum --check SHA256SUMS).

{audit_statement(plan)}

License: {plan.license}
""".encode()


def audit_statement(plan: Plan) -> str:
    """What is known about memorisation, or why nothing is, in one paragraph."""
    audit, differing = plan.audit, plan.audit.get("drawn_otherwise")
    if audit["passed"] is None:
        return f"The model was NOT audited for memorisation. Reason given: {audit['released_without_audit']}"
    if not audit["passed"]:
        return (
            f"The model FAILED its audit for memorisation: {audit['statement']} It was released all the same. Reason "
            f"given: {audit['released_without_audit']}"
        )
    limits = [
        *([f"on images that were, or may have been, drawn otherwise ({differing})"] if differing else []),
        *([f"it is too weak to release by ({audit['weak']})"] if audit.get("weak") else []),
    ]
    if limits:
        return (
            f"The audit of the model for memorisation passed ({audit['statement']}), but {' and '.join(limits)}. It "
            f"was released all the same. Reason given: {audit['released_without_audit']}"
        )
    return f"Audit of the model for memorisation, passed: {audit['statement']}"


def _audit_facts(plan: Plan) -> str:
    """A list of an audit's numbers; nothing without one."""
    facts = plan.audit.get("facts")
    return f"\n{_list(facts)}\n" if facts else ""


def _audit_lines(plan: Plan) -> str:
    """All that an audit says, after its statement; nothing without one."""
    lines = [f"* {line}\n" for line in plan.audit.get("lines", ()) if line != plan.audit["statement"]]
    return "\nIn the words of the audit:\n\n" + "".join(lines) if lines else ""


# of the whole release --------------------------------------------------------------------------------


def root_documents(
    plan: Plan, n: int, shards: Sequence[Mapping[str, Any]], environments: Mapping[str, Any]
) -> dict[str, bytes]:
    """Files of the release's root: name -> content.

    Args:
        plan: of the release.
        n: volumes.
        shards: one mapping a shard: ``shard``, ``first``, ``last``, ``volumes``, ``sha256`` of its ``SHA256SUMS``.
        environments: where volumes were made, by the name that ``provenance.tsv`` uses.
    """
    columns = ("shard", "first", "last", "volumes", "sha256")
    return {
        "README.md": _readme(plan, n, shards),
        "model_card.md": _model_card(plan, n),
        "provenance.json": as_json(_provenance(plan, n, environments)),
        **({} if plan.audit_copy is None else {"audit.json": as_json(plan.audit_copy)}),
        "shards.tsv": as_tsv(columns, [[shard[column] for column in columns] for shard in shards]),
        **license_file(plan),
    }


def _readme(plan: Plan, n: int, shards: Sequence[Mapping[str, Any]]) -> bytes:
    return f"""\
# {plan.name} (synthetic)

{SYNTHETIC} {PRIVACY}

{n} synthetic volumes in {len(shards)} shards. Each `shard-*/` is a BIDS data set by itself; participant numbers are
unique in the whole release.

* `shards.tsv`: which participants are in which shard
* `model_card.md`: what drew the images, what it was trained on, what they are for
* `provenance.json`, and `provenance.tsv` of every shard: model, settings, seed and number of every volume
{_about_audit(plan)}* `sessions/`: when and how fast it was made; the only files without a checksum
* `SHA256SUMS`: of the files here and of the checksums of every shard. To verify everything:

```
sha256sum --check SHA256SUMS && for s in shard-*; do (cd $s && sha256sum --check --quiet SHA256SUMS) || break; done
```

## Copies of training scans

{audit_statement(plan)}
{_audit_facts(plan)}
License: {plan.license}
""".encode()


def _about_audit(plan: Plan) -> str:
    if plan.audit_copy is None:
        return ""
    return "* `audit.json`: how copies of training scans were looked for, and what was found; of no scan by itself\n"


def _model_card(plan: Plan, n: int) -> bytes:
    header = plan.model.header
    return f"""\
# Model card of {plan.name} (synthetic)

{SYNTHETIC}

## Model

{_list(_model_facts(plan))}

Metrics from the model file, as its training measured them:

{_list(header.get("metrics") or {"none": "the model file holds no metrics"})}

{_evaluation(plan)}

## Sampling

{_list({"volumes": n, "seed": plan.seed, "conditions": plan.conditions.source, **plan.settings()})}

## Privacy

{PRIVACY}

{audit_statement(plan)}
{_audit_facts(plan)}{_audit_lines(plan)}
{USE}""".encode()


def _evaluation(plan: Plan) -> str:
    if plan.evaluation is None:
        return "No evaluation of its samples was given to this release."
    found = plan.evaluation
    judged = "\n".join(f"* {one['goal']} {one['status'].capitalize()}. {one['text']}" for one in found["verdicts"])
    text = f"Measured on its samples by `ldm evaluate`, each goal with whether it is met:\n\n{judged}"
    if found["measured"]:
        rows = {name: f"{_number(one['samples'])}; {_number(one['real'])}" for name, one in found["measured"].items()}
        text += f"\n\nOf its samples; and the same of real held-out images (95 % intervals):\n\n{_list(rows)}"
    if found["untrusted"]:
        names = ", ".join(found["untrusted"])
        text += f"\n\nLeft out, as they do not rank images that are known to be worse below real ones: {names}."
    return text


def _number(one: Mapping[str, Any]) -> str:
    if one["value"] is None:
        return "not known"
    interval = "" if one["interval"] is None else f" ({number(one['interval'][0])} to {number(one['interval'][1])})"
    return number(one["value"]) + interval


def _model_facts(plan: Plan) -> dict[str, Any]:
    model, header = plan.model, plan.model.header
    cohort = header.get("cohort", "unknown")
    shape = " x ".join(map(str, model.preprocessing.reference.original_shape))
    return {
        "kind": f"latent diffusion, prediction type {header['prediction_type']}",
        "tensors SHA-256": header["tensors_sha256"],
        "trained on": f"{cohort} (itself simulated)" if header.get("simulated") else cohort,
        "split SHA-256": header.get("split_sha256") or "unknown: the model was imported",
        "training steps": header.get("steps", "unknown"),
        "conditioned on": model.condition_in_words(),
        "volumes": f"{shape} voxels, {', '.join(plan.suffixes.values())}",
    }


def _list(facts: Mapping[str, Any]) -> str:
    lines = (
        f"* {name}: {value:.4g}" if isinstance(value, float) else f"* {name}: {value}" for name, value in facts.items()
    )
    return "\n".join(lines)


def _provenance(plan: Plan, n: int, environments: Mapping[str, Any]) -> dict[str, Any]:
    header = plan.model.header
    names = ("cohort", "simulated", "split_sha256", "first_stage_sha256", "steps", "seed", "versions", "metrics")
    return {
        **{name: value for name, value in plan.to_dict(n).items() if name != "environment"},
        "environments": dict(sorted(environments.items())),
        "model": {name: header.get(name) for name in names},
        "privacy": PRIVACY,
        "volumes": f"shard-*/{VOLUMES}: seed and index of a volume fix its noise",
        "batches": f"{plan.batch_size} volumes at a time, from a shard's first on; the last of a shard are filled up",
    }
