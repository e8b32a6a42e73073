# SPDX-License-Identifier: Apache-2.0
"""`--push_to_hub`: the folder that a run leaves goes to the hub, once, when it is complete.

Whether it can go there is found out before anything loads: who the token belongs to, and whether the repository can be
made or written. Checkpoints stay where they are. The token is in no log, no run's record and no folder.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from moellava.adapters.folder import FOLDER
from moellava.errors import UserError
from moellava.files import DIGESTS, PAGE, read_digests
from moellava.log import get_logger

logger = get_logger(__name__)

FAULTS: tuple[type[Any], ...] = (OSError, ValueError, RuntimeError, HfHubHTTPError.__bases__[0])
"""What the hub's library raises; the last is the base of its HTTP library's errors, and differs with versions."""

BESIDE = (DIGESTS, PAGE, "moe_certificate.json", "parameters.json")
"""Files of a stage's folder that are uploaded although no digest of them is in it."""


@dataclass(frozen=True)
class Hub:
    """Where a run's folder goes.

    Args:
        repository: --hub_model_id, or the name of --output_dir.
        token: --hub_token; None: what `hf auth login` has stored, or HF_TOKEN.
        private: --hub_private_repo; None: as the account has it.
        revision: --hub_revision, a branch; None: the main one.
    """

    repository: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None

    def prepared(self) -> Hub:
        """The same with the full name of its repository, which is there from here on.

        Raises:
            UserError: nobody is logged in, the hub is not reached, or the repository cannot be made or is another's.
        """
        api, named = HfApi(token=self.token), f"--hub_model_id {self.repository}"
        with self._named("--push_to_hub True"):
            who = api.whoami()["name"]
        with self._named(f"{named} (as {who})"):
            full = api.create_repo(self.repository, private=self.private, exist_ok=True).repo_id
            found = api.model_info(full).private
            if self.revision is not None:
                api.create_branch(full, branch=self.revision, exist_ok=True)
        if self.private is not None and bool(found) != self.private:
            raise UserError(
                f"--hub_private_repo {self.private}, but {full} exists and is {'private' if found else 'public'}. "
                "Change that in its settings on the hub, or name another repository: --hub_model_id."
            )
        logger.info("The complete folder will go to %s/%s", api.endpoint, full)
        return replace(self, repository=full)

    def upload(self, folder: Path) -> None:
        """Uploads what a run has left. Raises UserError; the folder stays complete."""
        names = files_of(folder)
        size = sum((folder / name).stat().st_size for name in names)
        logger.info("Uploading %d files (%.2f GB) to %s", len(names), size / 1e9, self.repository)
        with self._named(f"{folder} is complete, but did not go to {self.repository}"):
            done = HfApi(token=self.token).upload_folder(
                repo_id=self.repository,
                folder_path=folder,
                allow_patterns=[glob.escape(name) for name in names],
                revision=self.revision,
                commit_message="moellava: a complete folder",
            )
        logger.info("Uploaded: %s", done.commit_url)

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """What the hub's library raises is a UserError that begins with `what`, and never shows the token."""
        try:
            yield
        except FAULTS as error:
            said = " ".join(str(error).split()).rstrip(".")
            if self.token:
                said = said.replace(self.token, "<--hub_token>")
            raise UserError(f"{what}: {said[:400]}. {way_out(error)}") from None


def way_out(error: Exception) -> str:
    """What a user does about an error of the hub's library."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "Nobody is logged in: run `hf auth login`, set HF_TOKEN or give --hub_token."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it, or leave --push_to_hub out and upload later: `hf upload`."
    if status == 403:
        return "The token may not write there: it lacks that permission, or --hub_model_id is somebody else's."
    if isinstance(error, ValueError):
        return "Check --hub_model_id (NAME or OWNER/NAME), and the front matter of a README.md of your own."
    return f"Is {constants.ENDPOINT} reached from here? The same command, given again, uploads what is complete."


def hub_of(args: Any) -> Hub | None:
    """Where the flags send a run's folder; None without --push_to_hub."""
    if not args.push_to_hub:
        return None
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    return Hub(name, args.hub_token, args.hub_private_repo, args.hub_revision)


def files_of(folder: Path) -> list[str]:
    """What is uploaded of a folder: the model's own files, its page, and the adapter beside it, if there is one."""
    names = [*(read_digests(folder) or {}), *BESIDE]
    adapter = [f"{FOLDER}/{path.name}" for path in sorted((folder / FOLDER).glob("*"))]
    return [name for name in [*names, *adapter] if (folder / name).is_file()]
