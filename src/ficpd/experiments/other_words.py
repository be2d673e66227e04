"""The words of Flower, transformers' Trainer, PEFT and Opacus for the settings of a recipe."""

from collections.abc import Mapping

WORDS = {
    "backbone": "model, model_name, model_name_or_path, base_model_name_or_path, backbone_name, base_model",
    "backbone.dtype": "torch_dtype, fp16, bf16, precision",
    "backbone.attention": "attn_implementation",
    "compression": "quantization, compress",
    "data": "dataset, datasets, dataset_name, train_file, data_path, data_dir, input",
    "data.columns.target": "label, label_column, labels_column, target_column, y",
    "data.columns.text": "text_column, text_column_name, x",
    "data.max_records": "max_train_samples, num_samples",
    "data.test_fraction": "test_size, test_split, validation_split",
    "engine.checkpoint": "gradient_checkpointing",
    "federation.clients_per_round": "min_fit_clients, min_train_nodes, fraction_fit, fraction_train, cohort_size",
    "federation.evaluate_every": "eval_steps, evaluation_strategy, eval_strategy, fraction_evaluate",
    "federation.num_rounds": "rounds, num_server_rounds, server_rounds, n_rounds, global_rounds, comm_rounds",
    "method": "strategy, algorithm, aggregation, aggregator, server",
    "partition": "split, partitioner",
    "partition.concentration": "alpha, dirichlet_alpha, dirichlet",
    "partition.num_clients": "clients, n_clients, num_supernodes, num_partitions, num_nodes, sites, min_available_clients",
    "privacy": "dp, differential_privacy, privacy_engine",
    "privacy.clip_norm": "max_grad_norm, clipping_norm, l2_norm_clip, clip, max_norm",
    "privacy.delta": "target_delta",
    "privacy.epsilon": "eps, target_epsilon, budget",
    "privacy.noise": "secure_mode, secure_rng",
    "privacy.noise_multiplier": "sigma, noise_scale",
    "prompt": "prompt_tuning, peft, peft_config, soft_prompt",
    "prompt.num_tokens": "num_virtual_tokens, prompt_length, n_tokens, prompt_tokens",
    "prompt.text": "prompt_tuning_init_text",
    "training.batch_size": "batch, bs, per_device_train_batch_size, train_batch_size, local_batch_size",
    "training.decay": "lr_scheduler_type, scheduler, lr_decay",
    "training.l2_weight": "weight_decay",
    "training.learning_rate": "lr, eta, step_size, local_lr, client_lr",
    "training.local_steps": "epochs, num_epochs, num_train_epochs, local_epochs, max_steps, num_steps",
    "training.optimizer": "optim, optimiser, client_optimizer",
    "--out of `ficpd run`": "output_dir, out, output, run_dir",
    "--resume of `ficpd run`": "resume, resume_from_checkpoint",
    "--track of `ficpd run`": "report_to, wandb, tensorboard, mlflow",
}
"""By the setting, part or option of FICPD, the words that others use for it."""
NOTES = {"training.local_steps": " (it counts steps, not epochs)", "federation.clients_per_round": " (a number)"}
NAMED = {"backbone": "name", "method": "name", "data": "source", "privacy": "name", "compression": "name"}
"""The key of a part that one word stands for."""
PLACES = {word: place for place, words in WORDS.items() for word in words.split(", ")}


def setting_for(word: str, value: object = None) -> str:
    """Returns the setting, part or option that a word stands for, with a note; empty for other words.

    value: of the word in the recipe. A table stands for a part, another value for its main key.

    >>> setting_for("lr"), setting_for("num-server-rounds"), setting_for("Model", "minilm"), setting_for("model", {})
    ('training.learning_rate', 'federation.num_rounds', 'backbone.name', '[backbone]')
    """
    place = PLACES.get(word.lower().replace("-", "_"), "")
    if not place or "." in place or place.startswith("-"):
        return place + NOTES.get(place, "")
    return f"{place}.{NAMED[place]}" if place in NAMED and not isinstance(value, Mapping) else f"[{place}]"
