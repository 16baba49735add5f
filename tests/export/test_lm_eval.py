"""EleutherAI's evaluation harness scores an exported adapter through its own `hf` backend."""

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_tsd import advance, export_lora
from support import text_models, tiny

lm_eval = pytest.importorskip("lm_eval", reason="the harness is not installed: pip install lm-eval")

pytestmark = pytest.mark.long

QUESTIONS = [{"question": f"what is {word}?", "label": i % 3} for i, word in enumerate(text_models.WORDS[:6])]
OPTIONS = ["one", "two", "three"]

TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_choice": OPTIONS,
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_target": f"{{{{{OPTIONS}[label]}}}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "filter_list": [{"name": "bare", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(place) -> str:
    """Task files as a user of the harness writes them; nothing is fetched."""
    questions = text_models.jsonl(place / "questions.jsonl", QUESTIONS)
    for name, task in TASKS.items():
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(questions)}, "cache_dir": str(place / "cache")},
            "test_split": "test",
            "doc_to_text": "{{question}}\nAnswer:",
            **task,
        }
        (place / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return str(place)


@torch.inference_mode()
def log_likelihood(model, tokenizer, context: str, text: str) -> float:
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + text, return_tensors="pt")["input_ids"]
    logarithms = model(ids).logits[0].double().log_softmax(-1)
    return sum(logarithms[k - 1, ids[0, k]].item() for k in range(start, ids.shape[1]))


def test_an_exported_adapter_is_scored(tmp_path):
    """Its likelihoods and texts are those of the trained model itself, not those of the base."""
    from lm_eval.tasks import TaskManager

    base = AutoModelForCausalLM.from_pretrained(text_models.llama_folder(tmp_path / "model"))
    tokenizer = text_models.tokenizer()
    model = get_peft_model(base, tiny.config("lora-tsd", task_type="CAUSAL_LM", target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = tokenizer(
        [f"{row['question']}\nAnswer: {OPTIONS[row['label']]}\n" for row in QUESTIONS],
        return_tensors="pt",
        padding=True,
    )
    for _ in range(150):
        model(**ids, labels=ids["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(model, optimizer)
    export_lora(model, tmp_path / "adapter-lora")
    model.eval()

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'model'},peft={tmp_path / 'adapter-lora'},dtype=float32",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=write_tasks(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )

    right = 0
    for sample in results["samples"]["choose"]:
        context = f"{sample['doc']['question']}\nAnswer:"
        own = [log_likelihood(model, tokenizer, context, f" {option}") for option in OPTIONS]
        assert [likelihood for [(likelihood, _)] in sample["resps"]] == pytest.approx(own, abs=1e-4)
        right += own.index(max(own)) == sample["doc"]["label"]
        with model.disable_adapter():
            of_base = [log_likelihood(model, tokenizer, context, f" {option}") for option in OPTIONS]
        assert of_base != pytest.approx(own, abs=0.1)
    assert results["results"]["choose"]["acc,none"] == pytest.approx(right / len(QUESTIONS))

    right = 0
    for sample in results["samples"]["write"]:
        prompt = tokenizer(f"{sample['doc']['question']}\nAnswer:", return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).partition("\n")[0]
        assert sample["resps"] == [[text]]
        right += text.strip() == OPTIONS[sample["doc"]["label"]]
    assert right > 0
    assert results["results"]["write"]["exact_match,bare"] == pytest.approx(right / len(QUESTIONS))
