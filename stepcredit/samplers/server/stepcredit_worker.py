"""What a vLLM server runs for stepcredit; it needs nothing but vLLM.

    PYTHONPATH=FOLDER OF THIS FILE VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server \\
        --worker-extension-cls stepcredit_worker.Extension ...
"""

from typing import Any


class Extension:
    """Methods of every worker of the server, called by `/collective_rpc`."""

    model_runner: Any
    stepcredit_version = ""

    def stepcredit_load(self, folder: str, version: str) -> str:
        """Take over the weights in a folder; `version` is what the server says afterwards."""
        self.model_runner.reload_weights(weights_path=folder)
        for module in self.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":  # else a tied one stays what it was, on a CPU
                module.quant_method.process_weights_after_loading(module)
        self.stepcredit_version = version
        return version

    def stepcredit_loaded(self) -> str:
        """The version that was loaded last; empty at the server's start."""
        return self.stepcredit_version
