"""What happens before, while and after transformers loads a delta: its base is loaded with it."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.checkpoint.shard import Shard
from emp_llm.deltas.base import load_base
from emp_llm.deltas.sum_reader import with_base
from emp_llm.errors import CheckpointError, OptionError
from emp_llm.integration.configs import DeltaConfig
from emp_llm.integration.quantizers import PackedQuantizer
from emp_llm.integration.saving import conversions_of, set_conversions
from emp_llm.integration.weight_feed import FedConverter, FedPlainWeights
from emp_llm.loading.tensor_readers import TensorReader
from emp_llm.runtime.pipeline import thread_count
from emp_llm.runtime.progress import SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.tensors.packed_reader import PackedReader
from emp_llm.tensors.whole_reader import WholeReader

__all__ = ["DeltaQuantizer"]


class DeltaQuantizer(PackedQuantizer):
    """Adds every packed difference to the base's tensor while it is loaded.

    transformers is given the base's files before the delta's, so that it finds the tensors that
    only the base has; of those that both have it takes the delta's. The model is an ordinary dense
    one afterwards, and saved as such.
    """

    quantization_config: DeltaConfig

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        device_map: object = None,
        checkpoint_files: Sequence[str] | None = None,
        **options: object,
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError(
                "from_pretrained was given no files of a delta: pass its folder or Hub id, not a "
                "state_dict"
            )
        folder = Path(checkpoint_files[0]).parent
        workers = Workers(threads=thread_count(None), progress=SharedProgress(Silent()))
        self._base = load_base(folder, read_json_object(folder / CONFIG_NAME), workers)
        base_files = [str(shard.path) for shard in self._base.shards]
        if not isinstance(checkpoint_files, list):
            raise TypeError("transformers gave its files in no list that more can be added to")
        checkpoint_files[:0] = base_files
        super()._process_model_before_weight_loading(
            model, device_map=device_map, checkpoint_files=checkpoint_files, **options
        )

    def _open_readers(
        self, model: PreTrainedModel, conversions: list[WeightTransform]
    ) -> tuple[dict[str, TensorReader], list[str]]:
        device_map = self._placement.device_map if self._placement is not None else None
        if device_map and "disk" in device_map.values():
            raise OptionError(
                "device_map offloads weights to the disk, where transformers would leave some of "
                "the base's in the place of sums: load what `emp-llm unpack` makes of the delta"
            )
        return super()._open_readers(model, conversions)

    def _open_shard(
        self, shard: Shard
    ) -> tuple[dict[str, PackedReader | WholeReader], list[TensorEntry]]:
        """As of any packed checkpoint, with the base added to differences."""
        packed, plain = super()._open_shard(shard)
        return with_base(packed, self._files.file(shard), self._base, self._files), plain

    def _prepare_saving(self, model: PreTrainedModel) -> None:
        """Have the model saved dense."""
        set_conversions(
            model,
            [
                conversion.original if isinstance(conversion, FedConverter) else conversion
                for conversion in conversions_of(model)
                if not isinstance(conversion, FedPlainWeights)
            ],
        )
        del model.config.quantization_config
