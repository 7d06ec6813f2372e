"""What every test needs: no network, one thread, and a cache that goes away."""

import gc
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

gc.disable()  # until all tests are known: there is nothing to collect
os.environ["HF_HUB_OFFLINE"] = "1"
CACHE = tempfile.TemporaryDirectory(prefix="peptrain-tests-")  # removed when Python exits
os.environ["PEPTRAIN_CACHE"] = CACHE.name

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
torch.set_num_threads(1)


LONG = re.compile(
    r"test_a_process_without_peptrain_computes"
    r"|test_a_layer_is_one_graph"
    r"|test_a_llama_of_low_rank_maps\[False"
    r"|test_every_preset_has_its_closed_form\[(llama-(1b|7b|350m|250m)|qwen-1.5b)"
    r"|test_a_recipe_says_what_it_is_and_what_it_counts\[.*(1b|1\.3b|1\.5b|350m|250m)"
    r"|test_a_fused_run_has_the_plain_ones_losses\[(re)?lora"
    r"|test_a_run_goes_on_bit_for_bit_wherever_it_stopped\[(bf16|fp32|fp64-rotate)"
    r"|test_a_comparison_at_an_equal_budget"
    r"|test_runs_resumes_and_exports_as_without\[(?!full|loro|bpt)"
    r"|test_lora_and_relora\[(?!relora|lora\]|fresh, jagged|magnitude|online|scale\])"
    r"|test_a_run_from_the_face"
    r"|test_it_goes_through_every_command\[(?!silu)"
    r"|test_counts_bytes_and_operations_are_those_of_arithmetic"
    r"|test_the_blocks_of_a_file_run_in_order\[docs/guide"
    r"|test_finished_runs_are_read_killed_ones_resumed"
    r"|test_what_is_advised_helps_and_what_is_not_does_not\[relora"
    r"|test_no_module_stands_in_the_place_of_a_name"
    r"|test_the_largest_rank_fits_and_the_next"
    r"|test_an_event_that_is_too_much_is_named"
    r"|test_the_peak_is_what_a_step_takes\[(?!full|loro|bpt)"
    r"|test_rotated_q_k_v"
    r"|test_a_preset_says_which_sizes_of_a_recipe_it_leaves\[--model.preset llama"
    r"|test_killed_after_any_commit_it_ends_with_the_same_bytes"
    r"|test_the_counts_of_bpts_table_2"
    r"|test_low_rank_training\[llama-1b"
    r"|test_the_papers_counts\[(bpt-qwen|relora-pico)"
    r"|test_thin_products_of_a_backward_pass_are_stacked"
    r"|test_what_can_not_be_timed_says_why"
    r"|test_a_finished_run_that_is_given_more_steps"
    r"|test_the_first_loss_is_that_of_the_source\[(?!bpt|loro|relora)"
    r"|test_moments_come_back_in_the_dtype_that_they_had\[(?!full|loro|galore)"
    r"|test_(accumulation_is_one_big_batch|low_precision_trains_on_a_cpu)\[(?!.*(full|bpt|loro))"
    r"|test_the_configuration_of_(the|a)_run_replays_it\[(?!.*(full|bpt|loro))"
    r"|test_(recomputed_activations_change_no_loss|looking_at_a_training_changes_no_bit)"
    r"\[(?!.*(full|bpt|loro))"
    r"|test_a_method_trains_and_its_run_is_evaluated_and_exported\[(?!.*(full|relora|loro))"
    r"|test_a_kill_around_an_event_changes_no_bit\[(?!.*(full|bpt|relora|loro|galore))"
    r"|test_what_is_advised_helps_and_what_is_not_does_not\[lowrank-0.3"
    r"|test_a_fused_run_has_the_plain_ones_losses\[bpt"
    r"|test_the_papers_memory"
    r"|test_lora_s_memory_is_printed_with_the_embeddings_counted_twice"
    r"|test_a_resume_continues_one_series\[(?!step)"
    r"|test_every_method_can_be_analyzed\[(?!full|bpt)"
    r"|test_two_ranks_are_one_process"
    r"|test_the_blocks_of_a_file_run_in_order\[docs/methods/(?!loro|full)"
    r"|test_the_largest_micro_batch_fits_and_the_next_does_not"
    r"|test_a_configuration_file_is_estimated_as_it_is_trained"
    r"|test_what_is_advised_helps_and_what_is_not_does_not\[full-0.999"
    r"|test_each_line_is_logged_once_for_all_phases"
    r"|test_what_stays_is_named_with_its_parts"
    r"|test_what_is_left_unset_is_resolved_for_the_steps_of_the_run"
    r"|test_a_step_that_(is_too_much_is_told_from_what_stays|accumulates_holds_the_gradients)"
    r"|test_(few_steps_are_run_dry|where_what_stays_is_too_much_no_step_is_run_dry)"
    r"|test_pico_compat_changes_nothing_in_its_first_cycle_and_a_corrected_run_r_ranks"
    r"|test_(with_wsd_a_run_becomes_longer|a_run_killed_in_its_first_step_resumes"
    r"|with_the_same_settings_a_branch_becomes)\w*\[(?!full|bpt|relora|loro)"
    r"|test_killed_at_any_step_of_the_way_it_becomes_the_same_longer_run\[(?!7)"
    r"|test_killed_anywhere_in_the_move_the_longer_run_is_resumed"
    r"|test_the_last_row_has_the_flops_of_the_estimate\[(?!full)"
    r"|test_any_product_has_distinct_stable_names"
    r"|test_a_warm_start_that_is_too_much_is_named_by_its_steps"
    r"|test_no_more_products_are_stacked_than_x_has_columns"
    r"|test_what_does_not_fit_is_told_with_what_does"
    r"|test_a_warm_start_counts_as_full_training_and_merges_count"
    r"|test_a_creation_that_was_killed_is_no_hindrance\[(?!start)"
    r"|test_low_rank_and_full_steps_cost_what_arithmetic_says\[(?!40)"
    r"|test_a_search_says_nothing_of_the_models_it_tries"
    r"|test_killed_anywhere_the_same_command_ends_with_the_same_bytes\[(?!held_out_by_hash)"
    r"|test_a_name_is_there_in_a_new_process_twice\[(?!LORO)"
    r"|test_(a_loop_of_ones_own_is_the_trainers_training|it_learns)\[(?!.*(full|bpt|loro))"
)
"""Cases for the marker `slow`, beside those that carry it: the longest of their kind, by
`--durations`. What is left of a kind stays in the default run."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long cases, before pytest chooses by markers."""
    for item in items:
        if LONG.match(item.name):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Collect garbage among what the tests make, without what was imported for them: often enough
    that models in cycles leave, and quickly."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of 300 token ids."""
    from peptrain.testing import small_corpus

    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session", autouse=True)
def cheap_ends() -> Iterator[None]:
    """Do not count FLOPs at the end of every run, which takes longer than the tiny run itself."""
    import peptrain.training.loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peptrain.training.loop, "flops_per_token", lambda *args, **given: 1.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def undrawn() -> Iterator[None]:
    """Draw no figures of comparisons, which takes longer than to read their runs."""
    import peptrain.comparison.compare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peptrain.comparison.compare, "draw", lambda *args: None)
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures of the test's comparisons after all."""
    import peptrain.comparison.compare
    from peptrain.comparison.draw import draw

    monkeypatch.setattr(peptrain.comparison.compare, "draw", draw)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the FLOPs of the test's runs after all."""
    import peptrain.training.loop
    from peptrain.estimation.phases import flops_per_token

    monkeypatch.setattr(peptrain.training.loop, "flops_per_token", flops_per_token)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find the package that the tests find."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))
