"""Which cases of a property are quick, where there are several and each compiles programs.

`make test` is to end in half an hour on two cores. Of the tests here it runs the cases that are
named, one for every way in which the property could break; all others are marked slow, as are whole
tests in their own files, and `make test-slow` runs them.
"""

import pathlib
from collections.abc import Iterable

import pytest

# File -> test -> the ids of its quick cases.
QUICK_CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "evals/test_attention_maps.py": {
        "test_cross_attention_is_told_from_that_to_prompts": (
            "co_attention-bidirectional-deep",
            "two_stacks-forward-shallow",
        ),
        "test_uniform_attention_reaches_as_far_as_masks_allow": (
            "shared-query",
            "shared-forward",
            "three_towers-bidirectional",
        ),
        "test_what_is_read_of_prompts_is_in_no_map": (
            "shared-query-shallow",
            "three_towers-bidirectional-deep",
        ),
    },
    "evals/test_heldout.py": {"test_the_loss_is_that_of_the_objective": ("ar",)},
    "evals/test_text_task.py": {
        "test_figures_are_the_official_ones_of_the_answers": ("stsb",),
    },
    "evals/test_transfer_evals.py": {
        "test_occlusion_is_the_fall_when_a_cell_is_covered": (
            "two_stacks-query",
            "shared-bidirectional",
            "three_towers-forward",
        ),
    },
    "models/test_co_attention.py": {
        "test_objectives_train_what_they_read_and_nothing_else": ("mlm", "itc", "vqa"),
    },
    "models/test_decoding.py": {
        "test_beams_are_texts_of_their_own": ("pre", "shared"),
        "test_tokens_one_by_one_equal_the_whole_text": (
            "pre-12",
            "pre-17",
            "shared-12",
            "three_towers-17",
        ),
    },
    "models/test_prompts.py": {
        "test_prompts_carry_no_text_to_where_it_is_hidden": (
            "co_attention-bidirectional-deep",
            "shared-forward-reverse-shallow",
            "three_towers-forward-reverse-deep",
            "two_stacks-forward-reverse-shallow",
        ),
        "test_shallow_prompts_are_tokens_of_the_image": (
            "co_attention-bidirectional",
            "shared-forward-reverse",
            "two_stacks-bidirectional",
        ),
    },
    "models/test_three_towers.py": {
        "test_objectives_train_what_they_read_and_nothing_else": (
            "flm",
            "itc",
            "nlvr2",
            "text_mlm",
            "vqa",
        ),
    },
    "models/test_tuning.py": {
        "test_formulas_match_the_lowered_module": ("co_attention", "shared"),
        "test_fresh_additions_change_nothing": (
            "lora-co_attention",
            "parallel-shared",
            "parallel-two_stacks",
            "serial-three_towers",
        ),
        # A random pattern for every model and order of attention; the others stay random as well.
        "test_masked_equals_pruned": tuple(
            f"{case}-3"
            for case in (
                "co_attention-bidirectional",
                "shared-bidirectional",
                "shared-forward-reverse",
                "three_towers-bidirectional",
                "three_towers-forward-reverse",
                "two_stacks-bidirectional",
                "two_stacks-forward-reverse",
            )
        ),
    },
    "models/test_vision_language.py": {
        "test_stacked_streams_equal_separate_streams": ("post",),
    },
    "objectives/test_invariance.py": {
        "test_an_update_trains_and_the_loss_falls": ("simclr",),
        "test_queries_and_keys_are_compressed_apart": ("simclr",),
    },
    "tools/test_command.py": {  # each starts a process; of every tool one, and those that are quick
        "test_tools_refuse_bad_input": (
            "tools.bench step --config=tests/tiny_config.py --config.noke-",
            "tools.bench buckets --config=tests/tiny_config.py --config.c-",
            "tools.bench_decode --root=DRAWINGS-",
            "tools.bench_decode --root=DRAWINGS --split=val-",
            "tools.bench_decode --root=DRAWINGS --split=test-",
            "tools.bench_decode --root=nowhere-",
            "tools.bench_generate --config=tests/tiny_config.py --max_len-",
            "tools.bench_rank --workdir=nowhere-",
            "tools.import_weights --config=tests/tiny_config.py --out=x-",
            "tools.export_weights nowhere --out=x-",
            "tools.profile_table nowhere-",
            "tools.predict caption --nokey=1-",
            "vlp_jax.main --config=tests/tiny_config.py --workdir=x --con-",
        ),
    },
    "tools/test_skip_check.py": {
        "test_other_scenes_of_the_same_kind_pass": ("seeds0",),
        "test_scenes_of_another_kind_do_not": ("seeds0",),
    },
    "train/test_bucket_schedule.py": {
        "test_a_bucket_that_drops_nothing_gives_the_update_of_whole_images": ("itc",),
    },
    "train/test_config.py": {
        "test_shipped_config_runs_one_step": (
            "transfer.vqa",
            "transfer.classification",
            "transfer.glue",
        ),
    },
    "train/test_frozen.py": {
        "test_what_is_frozen_stays_and_the_rest_moves_as_beside_trained_ones": ("1",),
    },
    "train/test_gradient_error.py": {
        "test_a_run_is_measured_on_any_number_of_devices": ("one",),
    },
    "train/test_initial.py": {
        "test_answers_are_the_named_classes_by_probability": ("vqa",),
    },
    "train/test_searching.py": {
        "test_what_a_search_is_measured_against": ("similarity",),
    },
    "train/test_step.py": {"test_accumulated_equals_whole_batch": ("2",)},
    "transfer/test_generate.py": {
        "test_captions_are_well_formed": ("1-2", "3-3"),
        "test_eight_devices_equal_one": ("two_stacks-3", "shared-1"),
        "test_wide_beams_find_every_caption": ("2-0.7", "4-0.0"),
    },
    "transfer/test_quantize.py": {
        "test_after_units_were_skipped": ("co_attention", "shared"),
    },
    "transfer/test_structured.py": {
        "test_a_smaller_model_equals_one_whose_outputs_are_zero": (
            "co_attention-bidirectional",
            "shared-forward-reverse",
            "three_towers-bidirectional",
            "two_stacks-forward-reverse",
        ),
        "test_formulas_match_the_lowered_module": ("co_attention", "shared"),
        "test_what_no_output_reads_can_go": ("co_attention", "shared"),
    },
}


def mark_others_slow(items: Iterable[pytest.Item], tests: pathlib.Path, whole: bool) -> None:
    """Mark the cases that are not named.

    Args:
        items: that were collected.
        tests: the folder of all tests.
        whole: whether that was of whole files.

    Raises:
        pytest.UsageError: of a file that was collected as a whole, a case that is named is absent.
    """
    found: set[tuple[str, str, str]] = set()
    files = set()
    for item in items:
        file = item.path.relative_to(tests).as_posix()
        files.add(file)
        test, _, case = item.name.removesuffix("]").partition("[")
        quick = QUICK_CASES.get(file, {}).get(test)
        if quick is not None:
            found.add((file, test, case))
            if case not in quick:
                item.add_marker(pytest.mark.slow)
    named = {
        (file, test, case)
        for file in files & QUICK_CASES.keys()
        for test, cases in QUICK_CASES[file].items()
        for case in cases
    }
    if whole and named - found:
        file, test, case = min(named - found)
        raise pytest.UsageError(
            f"tests/quick_cases.py: {file} has no {test}[{case}]; mend the name"
        )
