"""What stays behind is known by its name; every other file travels."""

import pytest

from emp_llm.checkpoint.left_behind import sort_files

WEIGHTS = ["model.safetensors.index.json", "model-00001-of-00001.safetensors"]

TRAVEL = [
    # weights of other modules
    *("2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "adapter_model.safetensors"),
    *("adapter_model.bin", "speech-lora/adapter_model.safetensors", "model_head.pkl"),
    *("value_head.safetensors", "mm_projector.bin", "vision_tower/model.safetensors"),
    *("vision_tower.safetensors", "mtp.safetensors", "model_mtp.safetensors", "medusa_lm_head.pt"),
    *("lm_head.safetensors", "speaker_embeddings/v2/en_0.npz", "voices.npz", "voices/heart.pt"),
    *("campplus.onnx", "onnx/speech_tokenizer.onnx", "vocoder.bin", "hift.pt", "bpe.ckpt"),
    *("sparse_linear.pt", "tokenizer.model", "adapter_model.safetensors.index.json"),
    # projectors and drafts for llama.cpp
    *("mmproj-model-f16.gguf", "model-mmproj-Q8_0.gguf", "mtp-Q4_K_M.gguf", "draft.gguf"),
    # other models, whole
    *("draft/config.json", "draft/model.safetensors", "draft/model.safetensors.index.json"),
    *("draft/original/consolidated.00.pth", "draft/optimizer.pt", "text_encoder/model.onnx"),
    *("speech_tokenizer/model.safetensors", "unet/diffusion_pytorch_model.safetensors"),
    # what holds no weights
    *("README.md", "trainer_state.json", "originals.txt", "runs", "sub/config.json"),
    "additional_chat_templates/tool.jinja",
]

LEFT = {
    "the same weights in another file": [
        *("model.safetensors", "model-00002-of-00002.safetensors", "model.fp16.safetensors"),
        *("model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.bf16.safetensors"),
        *("model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"),
        *("pytorch_model.bin", "PYTORCH_MODEL.BIN", "pytorch_model-00001-of-00002.bin"),
        *("pytorch_model.bin.index.json", "pytorch_model.non_ema.bin", "model.bin", "model.pt"),
        *("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
    ],
    "the same weights in Meta's format": [
        *("consolidated.safetensors", "consolidated.00.pth", "consolidated.safetensors.index.json"),
        "consolidated-00001-of-00002.safetensors",
    ],
    "the same weights for TensorFlow": [
        *("tf_model.h5", "tf_model-00001-of-00002.h5", "tf_model.h5.index.json"),
        *("bert_model.ckpt.data-00000-of-00001", "bert_model.ckpt.index", "saved_model.pb"),
        "64-8bits.tflite",
    ],
    "the same weights for Flax": ["flax_model.msgpack", "flax_model.msgpack.index.json"],
    "the same weights for Rust": ["rust_model.ot"],
    "the same weights for MLX": ["weights.npz", "weights.00.npz"],
    "the same weights for Paddle": ["model_state.pdparams"],
    "the same weights for NeMo": ["parakeet-tdt-0.6b.nemo"],
    "the same weights for llama.cpp": [
        *("gemma-2b.gguf", "2b_it_v1p1.gguf", "model.gguf", "ggml-model-q4_0.gguf"),
        "Llama-3.2-11B-Vision-Instruct-Q4_K_M.gguf",
        *("gguf/qwen2-0_5b-fp16.gguf", "llama-BF16-00001-of-00003.gguf", "ggml-model-q4_0.bin"),
        "smollm.llamafile",
    ],
    "the same weights for ONNX": [
        *(
            "model.onnx",
            "model.onnx_data",
            "onnx/model_qint8_avx512.onnx",
            "onnx/model.onnx_data_1",
        ),
        *("onnx/decoder_model_merged.onnx", "onnx/decoder_with_past_model_fp16.onnx"),
        "onnx/vision_encoder_q4.onnx",
    ],
    "the same weights for Metal": ["metal/model.bin"],
    "training leftovers": [
        *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "training_args.bin"),
        *("rng_state.pth", "rng_state_3.pth", "random_states_0.pkl"),
        "mp_rank_00_model_states.pt",
    ],
}

FOLDERS = {
    "original/": ("original/params.json", "the same weights in Meta's format"),
    "saved_model/": ("saved_model/1/variables/variables.index", "the same weights for TensorFlow"),
    "openvino/": ("openvino/openvino_model_qint8.xml", "the same weights for OpenVINO"),
    "coreml/": ("coreml/text/f32.mlpackage/Manifest.json", "the same weights for Core ML"),
    "checkpoint-500/": ("checkpoint-500/model.safetensors", "training leftovers"),
    "global_step500/": ("global_step500/zero_pp_rank_0.pt", "training leftovers"),
    "pytorch_model/": ("pytorch_model/mp_rank_00_model_states.pt", "training leftovers"),
    "runs/": ("runs/Jan01_host/events.out.tfevents.1", "training leftovers"),
}


def left(*paths: str, meta_llama: bool = False) -> dict[str, str]:
    """What stays behind of some files, and why."""
    beside = sort_files(dict.fromkeys(paths, 1), WEIGHTS, meta_llama=meta_llama)
    return {entry["path"]: entry["reason"] for entry in beside.left_behind}


@pytest.mark.parametrize("path", TRAVEL)
def test_a_file_of_its_own_name_travels(path: str) -> None:
    beside = sort_files({path: 3}, WEIGHTS)
    assert beside.travelling == {path: 3}
    assert beside.left_behind == ()


@pytest.mark.parametrize("reason", LEFT)
def test_copies_of_the_weights_and_files_of_a_training_stay_behind(reason: str) -> None:
    assert left(*LEFT[reason]) == dict.fromkeys(LEFT[reason], reason)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_stays_behind_as_a_whole(folder: str) -> None:
    path, reason = FOLDERS[folder]
    beside = sort_files({path: 5, f"{folder}other.txt": 2}, WEIGHTS)
    assert beside.travelling == {}
    assert beside.left_behind == ({"path": folder, "reason": reason, "files": 2, "bytes": 7},)


def test_the_weights_the_config_and_hidden_files_are_neither() -> None:
    sizes = dict.fromkeys([*WEIGHTS, "config.json", ".git/x", "a/.b/c.bin"], 1)
    beside = sort_files(sizes, WEIGHTS)
    assert (beside.travelling, beside.left_behind) == ({}, ())


def test_what_describes_metas_format_stays_behind_with_it() -> None:
    paths = ["params.json", "checklist.chk"]
    assert left(*paths) == {}
    expected = dict.fromkeys(paths, "describes the weights in Meta's format")
    assert left(*paths, meta_llama=True) == expected
