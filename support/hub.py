"""Where a model's files are: in a folder, or fetched from the Hugging Face hub."""
import functools
import re
import threading
from pathlib import Path

from support.errors import InputError

SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")
WEIGHTS = "model*.safetensors"
HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"  # ORGANISATION/NAME
PATIENCE = 5  # seconds until the hub must have answered


@functools.cache
def model_folder(model, weights=True):
    """The folder of a model: a directory, or a name on the hub, fetched first.

    weights: whether they are needed too. Raises InputError, within seconds, where there is no such
    directory and nothing can be fetched.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{model}: no config.json in it. Give the directory of a model.")
        if weights and not any(folder.glob(WEIGHTS)):
            raise InputError(f"{model}: no model.safetensors in it, whole or in parts. "
                             "Other kinds of weights are not read.")
        return folder
    if folder.exists():
        raise InputError(f"{model}: a file. Give the directory of a model.")
    if not is_hub_name(model):
        raise InputError(f"{model}: no such directory. Check the path of the model.")
    patterns = [*SETTINGS, WEIGHTS] if weights else list(SETTINGS)
    return _fetch(str(model), patterns)


def load_config(model):
    """The config of a model: a directory, or a name on the hub."""
    from transformers import AutoConfig  # inside, because it takes seconds
    return AutoConfig.from_pretrained(model_folder(model, weights=False))


def is_hub_name(model):
    """Whether a name has the form of one on the hub, and is not a path to something missing.

    >>> is_hub_name("Qwen/Qwen3-0.6B"), is_hub_name("nosuch"), is_hub_name("runs/my/stage1")
    (True, False, False)
    >>> is_hub_name("support/nosuch")  # `support` is a folder here
    False
    """
    if not re.fullmatch(HUB_NAME, str(model)):
        return False
    return not Path(model).parent.exists()


def _fetch(name, patterns):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Without a connection the hub's own client tries for a minute.
        online = _hub_answers()
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=not online))
    except LocalEntryNotFoundError:
        problem = "no such directory, and there is no connection to fetch it. Check the path"
    except HfHubHTTPError as error:
        status = error.response.status_code
        problem = (
            f"no such directory, and the hub does not give it (status {status}). "
            "Check the name; for a gated model: `hf auth login`"
        )
    raise InputError(f"{name}: {problem}.")


def _hub_answers():
    """Whether the hub can be reached; its own client would look for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask():
        import requests

        try:
            requests.head(constants.ENDPOINT, timeout=PATIENCE)
            answered.set()
        except requests.RequestException:
            pass

    # In a thread, because the look-up of a host's name knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answered.is_set()
