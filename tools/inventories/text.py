"""Language models: causal, encoder, encoder-decoder. Config values are those of the public models' config.json."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from inventories import Entry, Row, linear, on_meta, prefixed, trace

ENTRIES: list[Entry] = []


def hf(class_name: str, config: dict[str, Any]) -> list[Row]:
    """The rows of a transformers model class built from config.json values."""
    import transformers

    values = {key: value for key, value in config.items() if key != "model_type"}
    settings = transformers.AutoConfig.for_model(config["model_type"], **values)
    model = on_meta(lambda: getattr(transformers, class_name)(settings))
    return trace(model)


def add(
    name: str,
    family: str,
    title: str,
    class_name: str,
    config: dict[str, Any],
    *ids: str,
    rows: Callable[[list[Row]], list[Row]] | None = None,
) -> None:
    """Register a base whose rows transformers gives, optionally changed by `rows`."""

    def build() -> list[Row]:
        found = hf(class_name, config)
        return rows(found) if rows else found

    ENTRIES.append(Entry(name, family, title, build, config, ids))


def _decoder(model_type: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, **more,
    }  # fmt: skip


def _llama() -> None:
    def llama(name: str, title: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, *ids: str, **more: Any) -> None:
        add(name, "llama", title, "LlamaForCausalLM", _decoder("llama", hidden, ffn, layers, heads, kv, vocab, **more), *ids)

    llama("llama-2-7b", "Llama 2 7B", 4096, 11008, 32, 32, 32, 32000, "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf",
          "NousResearch/Llama-2-7b-hf", "NousResearch/Llama-2-7b-chat-hf", "unsloth/llama-2-7b", "lmsys/vicuna-7b-v1.5",
          "codellama/CodeLlama-7b-Python-hf")  # fmt: skip
    llama("llama-2-13b", "Llama 2 13B", 5120, 13824, 40, 40, 40, 32000, "meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf",
          "NousResearch/Llama-2-13b-hf", "NousResearch/Llama-2-13b-chat-hf", "unsloth/llama-2-13b", "lmsys/vicuna-13b-v1.5")  # fmt: skip
    llama("llama-2-70b", "Llama 2 70B", 8192, 28672, 80, 64, 8, 32000, "meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf",
          "NousResearch/Llama-2-70b-hf")  # fmt: skip
    llama("llama-7b", "LLaMA 7B", 4096, 11008, 32, 32, 32, 32000, "huggyllama/llama-7b", "decapoda-research/llama-7b-hf",
          "yahma/llama-7b-hf", "baffo32/decapoda-research-llama-7B-hf", "lmsys/vicuna-7b-v1.3")  # fmt: skip
    llama("llama-13b", "LLaMA 13B", 5120, 13824, 40, 40, 40, 32000, "huggyllama/llama-13b", "decapoda-research/llama-13b-hf",
          "yahma/llama-13b-hf", "lmsys/vicuna-13b-v1.3")  # fmt: skip
    llama("llama-30b", "LLaMA 30B", 6656, 17920, 60, 52, 52, 32000, "huggyllama/llama-30b", "decapoda-research/llama-30b-hf")
    llama("llama-65b", "LLaMA 65B", 8192, 22016, 80, 64, 64, 32000, "huggyllama/llama-65b", "decapoda-research/llama-65b-hf")
    llama(
        "codellama-7b", "Code Llama 7B", 4096, 11008, 32, 32, 32, 32016, "codellama/CodeLlama-7b-hf", "codellama/CodeLlama-7b-Instruct-hf"
    )
    llama("codellama-13b", "Code Llama 13B", 5120, 13824, 40, 40, 40, 32016, "codellama/CodeLlama-13b-hf",
          "codellama/CodeLlama-13b-Instruct-hf")  # fmt: skip
    llama("codellama-34b", "Code Llama 34B", 8192, 22016, 48, 64, 8, 32000, "codellama/CodeLlama-34b-hf", "codellama/CodeLlama-34b-Instruct-hf",
          "codellama/CodeLlama-34b-Python-hf")  # fmt: skip
    llama("tinyllama-1.1b", "TinyLlama 1.1B", 2048, 5632, 22, 32, 4, 32000, "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
          "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "unsloth/tinyllama", "unsloth/tinyllama-chat")  # fmt: skip
    llama("llama-3-8b", "Llama 3 / 3.1 8B", 4096, 14336, 32, 32, 8, 128256, "meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct",
          "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B-Instruct",
          "unsloth/llama-3-8b", "unsloth/llama-3-8b-Instruct", "unsloth/Meta-Llama-3.1-8B", "NousResearch/Meta-Llama-3-8B",
          "NousResearch/Meta-Llama-3-8B-Instruct", "NousResearch/Hermes-3-Llama-3.1-8B", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
          "llama-3.1-8b")  # fmt: skip
    llama("llama-3-70b", "Llama 3 / 3.1 / 3.3 70B", 8192, 28672, 80, 64, 8, 128256, "meta-llama/Meta-Llama-3-70B",
          "meta-llama/Meta-Llama-3-70B-Instruct", "meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B-Instruct",
          "meta-llama/Meta-Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-70B-Instruct", "meta-llama/Llama-3.3-70B-Instruct",
          "unsloth/llama-3-70b", "unsloth/Meta-Llama-3.1-70B", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama-3.1-70b",
          "llama-3.3-70b")  # fmt: skip
    llama("llama-3.2-1b", "Llama 3.2 1B", 2048, 8192, 16, 32, 8, 128256, "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct",
          "unsloth/Llama-3.2-1B", head_dim=64)  # fmt: skip
    llama("llama-3.2-3b", "Llama 3.2 3B", 3072, 8192, 28, 24, 8, 128256, "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct",
          "unsloth/Llama-3.2-3B", head_dim=128)  # fmt: skip


def _mistral() -> None:
    def mistral(name: str, title: str, hidden: int, ffn: int, layers: int, heads: int, vocab: int, *ids: str) -> None:
        config = _decoder("mistral", hidden, ffn, layers, heads, 8, vocab, head_dim=128)
        add(name, "mistral", title, "MistralForCausalLM", config, *ids)

    mistral("mistral-7b", "Mistral 7B v0.1 / v0.2", 4096, 14336, 32, 32, 32000, "mistralai/Mistral-7B-v0.1",
            "mistralai/Mistral-7B-Instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.2", "unsloth/mistral-7b",
            "unsloth/mistral-7b-instruct-v0.1", "unsloth/mistral-7b-instruct-v0.2", "HuggingFaceH4/zephyr-7b-beta",
            "mistral-7b-v0.1", "mistral-7b-v0.2", "unsloth/zephyr-sft")  # fmt: skip
    mistral("mistral-7b-v0.3", "Mistral 7B v0.3", 4096, 14336, 32, 32, 32768, "mistralai/Mistral-7B-v0.3",
            "mistralai/Mistral-7B-Instruct-v0.3", "unsloth/mistral-7b-v0.3", "unsloth/mistral-7b-instruct-v0.3")  # fmt: skip
    mistral("mistral-nemo-12b", "Mistral Nemo 12B", 5120, 14336, 40, 32, 131072, "mistralai/Mistral-Nemo-Base-2407",
            "mistralai/Mistral-Nemo-Instruct-2407", "unsloth/Mistral-Nemo-Base-2407", "unsloth/Mistral-Nemo-Instruct-2407")  # fmt: skip
    mistral("mistral-small-22b", "Mistral Small 22B (2409)", 6144, 16384, 56, 48, 32768, "mistralai/Mistral-Small-Instruct-2409",
            "unsloth/Mistral-Small-Instruct-2409")  # fmt: skip
    mistral("mistral-small-24b", "Mistral Small 24B (2501)", 5120, 32768, 40, 32, 131072, "mistralai/Mistral-Small-24B-Base-2501",
            "mistralai/Mistral-Small-24B-Instruct-2501", "unsloth/Mistral-Small-24B-Base-2501",
            "unsloth/Mistral-Small-24B-Instruct-2501")  # fmt: skip

    def mixtral(name: str, title: str, hidden: int, ffn: int, layers: int, heads: int, vocab: int, *ids: str) -> None:
        config = _decoder("mixtral", hidden, ffn, layers, heads, 8, vocab, num_local_experts=8)
        add(name, "mistral", title, "MixtralForCausalLM", config, *ids, rows=lambda rows: mixtral_experts(rows, hidden, ffn))

    mixtral(
        "mixtral-8x7b", "Mixtral 8x7B", 4096, 14336, 32, 32, 32000, "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"
    )
    mixtral("mixtral-8x22b", "Mixtral 8x22B", 6144, 16384, 56, 48, 32000, "mistralai/Mixtral-8x22B-v0.1")


def mixtral_experts(rows: list[Row], hidden: int, ffn: int) -> list[Row]:
    """Mixtral as its public files name it: transformers 5 fuses the experts into bare parameters and renames the block."""
    found: list[Row] = []
    for row in rows:
        if row.path.endswith(".mlp.gate"):
            block = row.path.removesuffix("mlp.gate") + "block_sparse_moe"
            found.append(linear(f"{block}.gate", row.shape[0], hidden, bias=False))
            for expert in range(row.shape[0]):
                sizes = (("w1", ffn, hidden), ("w2", hidden, ffn), ("w3", ffn, hidden))
                found += [linear(f"{block}.experts.{expert}.{name}", out, into, bias=False) for name, out, into in sizes]
        else:
            found.append(row)
    return found


def _qwen() -> None:
    def qwen2(name: str, title: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, *ids: str) -> None:
        add(name, "qwen", title, "Qwen2ForCausalLM", _decoder("qwen2", hidden, ffn, layers, heads, kv, vocab), *ids)

    def both(size: str, *generations: str) -> tuple[str, ...]:
        ids: list[str] = []
        for generation in generations:
            tail = {"Qwen1.5": "-Chat"}.get(generation, "-Instruct")
            ids += [f"Qwen/{generation}-{size}", f"Qwen/{generation}-{size}{tail}"]
            ids += [f"unsloth/{generation}-{size}", f"unsloth/{generation}-{size}{tail}"] if generation != "Qwen1.5" else []
        return tuple(ids)

    qwen2("qwen1.5-0.5b", "Qwen1.5 0.5B", 1024, 2816, 24, 16, 16, 151936, *both("0.5B", "Qwen1.5"))
    qwen2("qwen1.5-1.8b", "Qwen1.5 1.8B", 2048, 5504, 24, 16, 16, 151936, *both("1.8B", "Qwen1.5"))
    qwen2("qwen1.5-4b", "Qwen1.5 4B", 2560, 6912, 40, 20, 20, 151936, *both("4B", "Qwen1.5"))
    qwen2("qwen1.5-7b", "Qwen1.5 7B", 4096, 11008, 32, 32, 32, 151936, *both("7B", "Qwen1.5"))
    qwen2("qwen1.5-14b", "Qwen1.5 14B", 5120, 13696, 40, 40, 40, 152064, *both("14B", "Qwen1.5"))
    qwen2("qwen1.5-32b", "Qwen1.5 32B", 5120, 27392, 64, 40, 8, 152064, *both("32B", "Qwen1.5"))
    qwen2("qwen1.5-72b", "Qwen1.5 72B", 8192, 24576, 80, 64, 64, 152064, *both("72B", "Qwen1.5"))
    qwen2(
        "qwen2-0.5b", "Qwen2 / 2.5 0.5B", 896, 4864, 24, 14, 2, 151936, *both("0.5B", "Qwen2", "Qwen2.5", "Qwen2.5-Coder"), "qwen2.5-0.5b"
    )
    qwen2("qwen2-1.5b", "Qwen2 / 2.5 1.5B", 1536, 8960, 28, 12, 2, 151936, *both("1.5B", "Qwen2", "Qwen2.5", "Qwen2.5-Coder"), "qwen2.5-1.5b",
          "Qwen/Qwen2.5-Math-1.5B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")  # fmt: skip
    qwen2("qwen2.5-3b", "Qwen2.5 3B", 2048, 11008, 36, 16, 2, 151936, *both("3B", "Qwen2.5", "Qwen2.5-Coder"))
    qwen2("qwen2-7b", "Qwen2 / 2.5 7B", 3584, 18944, 28, 28, 4, 152064, *both("7B", "Qwen2", "Qwen2.5", "Qwen2.5-Coder"), "qwen2.5-7b",
          "Qwen/Qwen2.5-Math-7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")  # fmt: skip
    qwen2("qwen2.5-14b", "Qwen2.5 14B", 5120, 13824, 48, 40, 8, 152064, *both("14B", "Qwen2.5", "Qwen2.5-Coder"),
          "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B")  # fmt: skip
    qwen2("qwen2.5-32b", "Qwen2.5 32B", 5120, 27648, 64, 40, 8, 152064, *both("32B", "Qwen2.5", "Qwen2.5-Coder"), "Qwen/QwQ-32B",
          "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B")  # fmt: skip
    qwen2("qwen2-72b", "Qwen2 / 2.5 72B", 8192, 29568, 80, 64, 8, 152064, *both("72B", "Qwen2", "Qwen2.5"), "qwen2.5-72b")

    def qwen3(name: str, title: str, hidden: int, ffn: int, layers: int, heads: int, *ids: str) -> None:
        config = _decoder("qwen3", hidden, ffn, layers, heads, 8, 151936, head_dim=128)
        size = title.split()[-1]
        names = (f"Qwen/Qwen3-{size}", f"Qwen/Qwen3-{size}-Base", f"unsloth/Qwen3-{size}", f"unsloth/Qwen3-{size}-Base")
        add(name, "qwen", title, "Qwen3ForCausalLM", config, *names, *ids)

    qwen3("qwen3-0.6b", "Qwen3 0.6B", 1024, 3072, 28, 16)
    qwen3("qwen3-1.7b", "Qwen3 1.7B", 2048, 6144, 28, 16)
    qwen3("qwen3-4b", "Qwen3 4B", 2560, 9728, 36, 32, "Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507",
          "unsloth/Qwen3-4B-Instruct-2507")  # fmt: skip
    qwen3("qwen3-8b", "Qwen3 8B", 4096, 12288, 36, 32, "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B")
    qwen3("qwen3-14b", "Qwen3 14B", 5120, 17408, 40, 40)
    qwen3("qwen3-32b", "Qwen3 32B", 5120, 25600, 64, 64)


def _gemma() -> None:
    def gemma(
        name: str,
        title: str,
        model: str,
        cls: str,
        hidden: int,
        ffn: int,
        layers: int,
        heads: int,
        kv: int,
        head: int,
        vocab: int,
        *ids: str,
    ) -> None:
        config = _decoder(model, hidden, ffn, layers, heads, kv, vocab, head_dim=head)
        add(name, "gemma", title, cls, config, *ids)

    one, two = ("gemma", "GemmaForCausalLM"), ("gemma2", "Gemma2ForCausalLM")
    gemma("gemma-2b", "Gemma 2B", *one, 2048, 16384, 18, 8, 1, 256, 256000, "google/gemma-2b", "google/gemma-2b-it", "google/gemma-1.1-2b-it",
          "google/codegemma-2b", "unsloth/gemma-2b", "unsloth/gemma-2b-it")  # fmt: skip
    gemma("gemma-7b", "Gemma 7B", *one, 3072, 24576, 28, 16, 16, 256, 256000, "google/gemma-7b", "google/gemma-7b-it", "google/gemma-1.1-7b-it",
          "google/codegemma-7b", "unsloth/gemma-7b", "unsloth/gemma-7b-it")  # fmt: skip
    gemma("gemma-2-2b", "Gemma 2 2B", *two, 2304, 9216, 26, 8, 4, 256, 256000, "google/gemma-2-2b", "google/gemma-2-2b-it", "unsloth/gemma-2-2b",
          "unsloth/gemma-2-2b-it")  # fmt: skip
    gemma("gemma-2-9b", "Gemma 2 9B", *two, 3584, 14336, 42, 16, 8, 256, 256000, "google/gemma-2-9b", "google/gemma-2-9b-it",
          "unsloth/gemma-2-9b", "unsloth/gemma-2-9b-it")  # fmt: skip
    gemma("gemma-2-27b", "Gemma 2 27B", *two, 4608, 36864, 46, 32, 16, 128, 256000, "google/gemma-2-27b", "google/gemma-2-27b-it",
          "unsloth/gemma-2-27b", "unsloth/gemma-2-27b-it")  # fmt: skip
    gemma("gemma-3-1b", "Gemma 3 1B", "gemma3_text", "Gemma3ForCausalLM", 1152, 6912, 26, 4, 1, 256, 262144, "google/gemma-3-1b-pt",
          "google/gemma-3-1b-it", "unsloth/gemma-3-1b-pt", "unsloth/gemma-3-1b-it")  # fmt: skip

    def gemma3(size: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, head: int) -> None:
        text = {
            key: value for key, value in _decoder("", hidden, ffn, layers, heads, kv, 262208, head_dim=head).items() if key != "model_type"
        }
        seen = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896,
                "patch_size": 14, "vision_use_head": False}  # fmt: skip
        config = {"model_type": "gemma3", "text_config": text, "vision_config": seen}
        ids = tuple(f"{owner}/gemma-3-{size}-{kind}" for owner in ("google", "unsloth") for kind in ("pt", "it"))
        title = f"Gemma 3 {size.upper()} (text and vision)"
        add(f"gemma-3-{size}", "gemma", title, "Gemma3ForConditionalGeneration", config, *ids, rows=gemma3_names)

    gemma3("4b", 2560, 10240, 34, 8, 4, 256)
    gemma3("12b", 3840, 15360, 48, 16, 8, 256)
    gemma3("27b", 5376, 21504, 62, 32, 16, 128)


def gemma3_names(rows: list[Row]) -> list[Row]:
    """Gemma 3's names as transformers 4.52 and later show them to PEFT; transformers 5 leaves out `vision_model.`."""
    return [
        row._replace(path=re.sub(r"^model\.vision_tower\.(?!vision_model\.)", "model.vision_tower.vision_model.", row.path)) for row in rows
    ]


def _phi() -> None:
    add(
        "phi-1.5",
        "phi",
        "Phi-1.5 1.3B",
        "PhiForCausalLM",
        _decoder("phi", 2048, 8192, 24, 32, 32, 51200),
        "microsoft/phi-1_5",
        "microsoft/phi-1",
    )
    add("phi-2", "phi", "Phi-2 2.7B", "PhiForCausalLM", _decoder("phi", 2560, 10240, 32, 32, 32, 51200), "microsoft/phi-2")

    def phi3(name: str, title: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, *ids: str) -> None:
        config = _decoder("phi3", hidden, ffn, layers, heads, kv, vocab, pad_token_id=0)
        add(name, "phi", title, "Phi3ForCausalLM", config, *ids)

    phi3("phi-3-mini", "Phi-3 / 3.5 mini 3.8B", 3072, 8192, 32, 32, 32, 32064, "microsoft/Phi-3-mini-4k-instruct",
         "microsoft/Phi-3-mini-128k-instruct", "microsoft/Phi-3.5-mini-instruct", "phi-3.5-mini")  # fmt: skip
    phi3("phi-3-medium", "Phi-3 medium 14B", 5120, 17920, 40, 40, 10, 32064, "microsoft/Phi-3-medium-4k-instruct",
         "microsoft/Phi-3-medium-128k-instruct")  # fmt: skip
    phi3("phi-4", "Phi-4 14B", 5120, 17920, 40, 40, 10, 100352, "microsoft/phi-4")
    phi3("phi-4-mini", "Phi-4 mini 3.8B", 3072, 8192, 32, 24, 8, 200064, "microsoft/Phi-4-mini-instruct")


def _older() -> None:
    falcon = {"model_type": "falcon", "vocab_size": 65024, "bias": False, "parallel_attn": True, "multi_query": True}
    add("falcon-7b", "falcon", "Falcon 7B", "FalconForCausalLM",
        falcon | {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "new_decoder_architecture": False},
        "tiiuae/falcon-7b", "tiiuae/falcon-7b-instruct", "ybelkada/falcon-7b-sharded-bf16")  # fmt: skip
    add("falcon-40b", "falcon", "Falcon 40B", "FalconForCausalLM",
        falcon | {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True},
        "tiiuae/falcon-40b", "tiiuae/falcon-40b-instruct")  # fmt: skip

    for name, title, width, layers, heads in (
        ("gpt2", "GPT-2 124M", 768, 12, 12),
        ("gpt2-medium", "GPT-2 medium 355M", 1024, 24, 16),
        ("gpt2-large", "GPT-2 large 774M", 1280, 36, 20),
        ("gpt2-xl", "GPT-2 XL 1.5B", 1600, 48, 25),
    ):
        config = {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": 50257, "n_positions": 1024}
        add(name, "gpt2", title, "GPT2LMHeadModel", config, f"openai-community/{name}")
    add("distilgpt2", "gpt2", "DistilGPT-2 82M", "GPT2LMHeadModel",
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 6, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}, "distilbert/distilgpt2")  # fmt: skip

    for name, title, width, layers, heads, vocab, *ids in (
        ("gpt-neox-20b", "GPT-NeoX 20B", 6144, 44, 64, 50432, "EleutherAI/gpt-neox-20b"),
        ("pythia-70m", "Pythia 70M", 512, 6, 8, 50304, "EleutherAI/pythia-70m", "EleutherAI/pythia-70m-deduped"),
        ("pythia-160m", "Pythia 160M", 768, 12, 12, 50304, "EleutherAI/pythia-160m", "EleutherAI/pythia-160m-deduped"),
        ("pythia-410m", "Pythia 410M", 1024, 24, 16, 50304, "EleutherAI/pythia-410m", "EleutherAI/pythia-410m-deduped"),
        ("pythia-1b", "Pythia 1B", 2048, 16, 8, 50304, "EleutherAI/pythia-1b", "EleutherAI/pythia-1b-deduped"),
        ("pythia-1.4b", "Pythia 1.4B", 2048, 24, 16, 50304, "EleutherAI/pythia-1.4b", "EleutherAI/pythia-1.4b-deduped"),
        ("pythia-2.8b", "Pythia 2.8B", 2560, 32, 32, 50304, "EleutherAI/pythia-2.8b", "EleutherAI/pythia-2.8b-deduped"),
        ("pythia-6.9b", "Pythia 6.9B", 4096, 32, 32, 50432, "EleutherAI/pythia-6.9b", "EleutherAI/pythia-6.9b-deduped"),
        ("pythia-12b", "Pythia 12B", 5120, 36, 40, 50688, "EleutherAI/pythia-12b", "EleutherAI/pythia-12b-deduped",
         "databricks/dolly-v2-12b", "OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5"),
    ):  # fmt: skip
        config = {"model_type": "gpt_neox", "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                  "num_attention_heads": heads, "vocab_size": vocab}  # fmt: skip
        add(str(name), "neox", str(title), "GPTNeoXForCausalLM", config, *map(str, ids), rows=neox_names)

    add("gpt-j-6b", "gptj", "GPT-J 6B", "GPTJForCausalLM",
        {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "vocab_size": 50400, "rotary_dim": 64},
        "EleutherAI/gpt-j-6b", "EleutherAI/gpt-j-6B", "togethercomputer/GPT-JT-6B-v1")  # fmt: skip
    for size, width, layers, heads in (("125m", 768, 12, 12), ("1.3b", 2048, 24, 16), ("2.7b", 2560, 32, 20)):
        config = {"model_type": "gpt_neo", "hidden_size": width, "num_layers": layers, "num_heads": heads, "vocab_size": 50257,
                  "attention_types": [[["global", "local"], layers // 2]]}  # fmt: skip
        add(f"gpt-neo-{size}", "gpt-neo", f"GPT-Neo {size.upper()}", "GPTNeoForCausalLM", config, f"EleutherAI/gpt-neo-{size.upper()}")

    for size, width, ffn, layers, heads in (
        ("125m", 768, 3072, 12, 12), ("350m", 1024, 4096, 24, 16), ("1.3b", 2048, 8192, 24, 32), ("2.7b", 2560, 10240, 32, 32),
        ("6.7b", 4096, 16384, 32, 32), ("13b", 5120, 20480, 40, 40), ("30b", 7168, 28672, 48, 56),
    ):  # fmt: skip
        config = {"model_type": "opt", "hidden_size": width, "ffn_dim": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
                  "vocab_size": 50272, "word_embed_proj_dim": 512 if size == "350m" else width}  # fmt: skip
        config |= {"do_layer_norm_before": False} if size == "350m" else {}
        add(f"opt-{size}", "opt", f"OPT {size.upper()}", "OPTForCausalLM", config, f"facebook/opt-{size}")

    for size, width, layers, heads in (
        ("560m", 1024, 24, 16),
        ("1b1", 1536, 24, 16),
        ("1b7", 2048, 24, 16),
        ("3b", 2560, 30, 32),
        ("7b1", 4096, 30, 32),
    ):
        config = {"model_type": "bloom", "hidden_size": width, "n_layer": layers, "n_head": heads, "vocab_size": 250880}
        add(
            f"bloom-{size}",
            "bloom",
            f"BLOOM {size.upper()}",
            "BloomForCausalLM",
            config,
            f"bigscience/bloom-{size}",
            f"bigscience/bloomz-{size}",
        )


def neox_names(rows: list[Row]) -> list[Row]:
    """GPT-NeoX's head under its public name, `embed_out`."""
    return [row._replace(path="embed_out") if row.path == "lm_head" else row for row in rows]


def roberta_order(rows: list[Row]) -> list[Row]:
    """The order of transformers 4: word, position, token type embeddings, then the layers, the head last (5 builds some of them elsewhere)."""
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")

    def place(row: Row) -> tuple[bool, int]:
        tail = row.path.rsplit(".", 1)[-1]
        return row.path.startswith("lm_head"), names.index(tail) if tail in names else len(names)

    return sorted(rows, key=place)


def _encoders() -> None:
    base = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    for name, title, sizes, vocab, *ids in (
        ("bert-base-uncased", "BERT base uncased", base, 30522, "google-bert/bert-base-uncased"),
        ("bert-base-cased", "BERT base cased", base, 28996, "google-bert/bert-base-cased", "dslim/bert-base-NER"),
        ("bert-base-multilingual-cased", "BERT base multilingual", base, 119547, "google-bert/bert-base-multilingual-cased"),
        ("bert-base-chinese", "BERT base Chinese", base, 21128, "google-bert/bert-base-chinese"),
        ("bert-large-uncased", "BERT large uncased", large, 30522, "google-bert/bert-large-uncased"),
        ("bert-large-cased", "BERT large cased", large, 28996, "google-bert/bert-large-cased"),
    ):
        add(str(name), "bert", str(title), "BertForMaskedLM", {"model_type": "bert", "vocab_size": vocab, **sizes}, *map(str, ids))
    roberta = {"type_vocab_size": 1, "max_position_embeddings": 514}
    for name, title, model, cls, sizes, vocab, *ids in (
        ("roberta-base", "RoBERTa base", "roberta", "RobertaForMaskedLM", base, 50265, "FacebookAI/roberta-base"),
        ("roberta-large", "RoBERTa large", "roberta", "RobertaForMaskedLM", large, 50265, "FacebookAI/roberta-large"),
        ("xlm-roberta-base", "XLM-RoBERTa base", "xlm-roberta", "XLMRobertaForMaskedLM", base, 250002, "FacebookAI/xlm-roberta-base"),
        ("xlm-roberta-large", "XLM-RoBERTa large", "xlm-roberta", "XLMRobertaForMaskedLM", large, 250002, "FacebookAI/xlm-roberta-large"),
    ):
        add(
            str(name),
            "roberta",
            str(title),
            str(cls),
            {"model_type": model, "vocab_size": vocab, **sizes, **roberta},
            *map(str, ids),
            rows=roberta_order,
        )
    distil = {"model_type": "distilbert", "dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12}
    add("distilbert-base-uncased", "distilbert", "DistilBERT base uncased", "DistilBertForMaskedLM", distil | {"vocab_size": 30522},
        "distilbert/distilbert-base-uncased", "distilbert-base-uncased-finetuned-sst-2-english",
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english")  # fmt: skip
    add("distilbert-base-cased", "distilbert", "DistilBERT base cased", "DistilBertForMaskedLM", distil | {"vocab_size": 28996},
        "distilbert/distilbert-base-cased")  # fmt: skip
    for size, width, ffn, layers, heads in (("base", 768, 3072, 12, 12), ("large", 1024, 4096, 24, 16), ("xlarge", 2048, 8192, 24, 16)):
        config = {"model_type": "albert", "embedding_size": 128, "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers,
                  "num_attention_heads": heads, "vocab_size": 30000, "num_hidden_groups": 1, "inner_group_num": 1}  # fmt: skip
        add(f"albert-{size}-v2", "albert", f"ALBERT {size} v2", "AlbertForMaskedLM", config, f"albert/albert-{size}-v2")
    deberta = {"model_type": "deberta-v2", "vocab_size": 128100, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 256,
               "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}  # fmt: skip
    for size, sizes in (
        ("xsmall", {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}),
        ("small", base | {"num_hidden_layers": 6}), ("base", base), ("large", large),
    ):  # fmt: skip
        add(f"deberta-v3-{size}", "deberta", f"DeBERTa v3 {size} (classifier)", "DebertaV2ForSequenceClassification",
            deberta | sizes | {"pooler_hidden_size": sizes["hidden_size"]}, f"microsoft/deberta-v3-{size}")  # fmt: skip


def _t5() -> None:
    def t5(name: str, title: str, width: int, ffn: int, kv: int, layers: int, heads: int, gated: bool, *ids: str) -> None:
        config = {"model_type": "t5", "d_model": width, "d_ff": ffn, "d_kv": kv, "num_layers": layers, "num_heads": heads, "vocab_size": 32128,
                  "feed_forward_proj": "gated-gelu" if gated else "relu"}  # fmt: skip
        config |= {"tie_word_embeddings": False} if gated else {}
        add(name, "t5", title, "T5ForConditionalGeneration", config, *ids)

    t5("t5-small", "T5 small", 512, 2048, 64, 6, 8, False, "google-t5/t5-small")
    t5("t5-base", "T5 base", 768, 3072, 64, 12, 12, False, "google-t5/t5-base")
    t5("t5-large", "T5 large", 1024, 4096, 64, 24, 16, False, "google-t5/t5-large")
    t5("t5-3b", "T5 3B", 1024, 16384, 128, 24, 32, False, "google-t5/t5-3b")
    t5("flan-t5-small", "Flan-T5 / T5 v1.1 small", 512, 1024, 64, 8, 6, True, "google/flan-t5-small", "google/t5-v1_1-small")
    t5("flan-t5-base", "Flan-T5 / T5 v1.1 base", 768, 2048, 64, 12, 12, True, "google/flan-t5-base", "google/t5-v1_1-base")
    t5("flan-t5-large", "Flan-T5 / T5 v1.1 large", 1024, 2816, 64, 24, 16, True, "google/flan-t5-large", "google/t5-v1_1-large")
    t5("flan-t5-xl", "Flan-T5 / T5 v1.1 XL", 2048, 5120, 64, 24, 32, True, "google/flan-t5-xl", "google/t5-v1_1-xl")
    t5("flan-t5-xxl", "Flan-T5 / T5 v1.1 XXL", 4096, 10240, 64, 24, 64, True, "google/flan-t5-xxl", "google/t5-v1_1-xxl")


def clip_text(hidden: int, ffn: int, layers: int, heads: int, projection: int | None = None) -> list[Row]:
    """CLIP's text model as public files name it (`text_model.` in front, which transformers 5 leaves out without a projection head)."""
    import transformers

    settings = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=77, projection_dim=projection or hidden,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    rows = trace(on_meta(lambda: cls(settings)))
    return rows if rows[0].path.startswith("text_model.") else prefixed("text_model.", rows)


def t5_encoder() -> list[Row]:
    """The encoder of T5 v1.1 XXL, text encoder of SD3, FLUX and many others."""
    import transformers

    settings = transformers.T5Config(
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_layers=24,
        num_heads=64,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return trace(on_meta(lambda: transformers.T5EncoderModel(settings)))


for _register in (_llama, _mistral, _qwen, _gemma, _phi, _older, _encoders, _t5):
    _register()
