"""RO-Crate metadata of a bundle, of the Process Run Crate profile: which stage made which files."""

import hashlib
import json
import mimetypes
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rocrate.model.contextentity import ContextEntity
from rocrate.rocrate import ROCrate

from kit.pipeline.stages import Stage, incomplete

PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
MEDIA = {".ipynb": "application/x-ipynb+json", ".toml": "application/toml",
         ".parquet": "application/vnd.apache.parquet", ".md": "text/markdown",
         ".cff": "application/yaml", ".safetensors": "application/octet-stream"}  # fmt: skip


def of_stage(name: str, stage: str) -> bool:
    """Whether the file `name` of a run is what `stage` left."""
    return Path(name).name.split(".")[0] == stage or name.startswith(f"exhibits/{stage}/")


def metadata(
    profile: str, files: Mapping[str, bytes], all_stages: Sequence[Stage], commit: str
) -> str:
    """JSON: one CreateAction per stage that ran to its end, or failed."""
    crate, licence_url = ROCrate(version="1.1"), "https://www.apache.org/licenses/LICENSE-2.0"
    crate.name = f"Memory instead of parameters: run of the {profile} profile"
    crate.description = "Executed notebooks, records, tables, figures, verdicts and their sources."
    if unfinished := incomplete(all_stages):
        crate.description += f" INCOMPLETE: {unfinished}."
    about = {"@type": "CreativeWork", "name": "Apache License 2.0", "identifier": "Apache-2.0"}
    crate.license = licence = crate.add(ContextEntity(crate, licence_url, about))
    statuses = {name: json.loads(files[name]) for name in files if name.startswith("status/")}
    finish_times = [status.get("finished") for status in statuses.values()]
    crate.datePublished = max(filter(None, finish_times), default="1980-01-01")
    about = {"@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"}
    crate.root_dataset["conformsTo"] = crate.add(ContextEntity(crate, PROFILE, about))
    about = {"@type": "SoftwareApplication", "name": "the kit", "version": commit}
    kit = crate.add(ContextEntity(crate, "#kit", about))
    kit["license"] = licence
    types = mimetypes.MimeTypes(())  # whatever this machine knows
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / name).write_bytes(data)
        entities = {name: crate.add_file(Path(scratch) / name, name, properties={
            "contentSize": str(len(data)), "sha256": hashlib.sha256(data).hexdigest(),
            "encodingFormat": MEDIA.get(Path(name).suffix)
            or types.guess_type(name)[0] or "text/plain",
        }) for name, data in files.items()}  # fmt: skip
        inputs = [entities[name] for name in ("claims.toml", "requirements.lock")]
        for stage in all_stages:
            outputs = [file for name, file in entities.items() if of_stage(name, stage.name)]
            status = statuses.get(f"status/{stage.name}.json")
            if stage.failure:
                status = json.loads(files[f"notebooks/{stage.failed.name}"])["metadata"]["kit"]
            if not status:
                continue
            ended = "FailedActionStatus" if stage.failure else "CompletedActionStatus"
            about = {"name": f"{stage.name}, {profile}",
                     "description": f"make reproduce PROFILE={profile} ONLY={stage.number}",
                     "startTime": status.get("started"), "endTime": status.get("finished"),
                     "actionStatus": f"http://schema.org/{ended}",
                     "error": stage.failure}  # fmt: skip
            about = {key: value for key, value in about.items() if value}
            action = crate.add_action(kit, f"#run-{stage.name}", inputs, outputs, about)
            crate.root_dataset.append_to("mentions", action)
        return json.dumps(crate.metadata.generate(), indent=1, ensure_ascii=False)
