"""What every test needs: no network, one thread, and a cache that goes away."""

import gc
import os
import random
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

gc.disable()  # until all tests are known: there is nothing to collect
os.environ["HF_HUB_OFFLINE"] = "1"
CACHE = tempfile.TemporaryDirectory(prefix="peptrain-tests-")  # removed when Python exits
os.environ["PEPTRAIN_CACHE"] = CACHE.name

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("same", derandomize=True)  # each run of the tests has the same examples
settings.load_profile("same")

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
    r"|test_one_that_fails_is_off_after_one_line_and_the_run_is_the_same\[exit-(open|close)"
    r"|test_one_that_hangs_is_left_behind\[(open|log)"
    r"|test_a_killed_and_resumed_run_is_one_series\[wandb"
    r"|test_a_run_made_longer_from_an_earlier_step_is_another_series"
    r"|test_(a_loop_of_ones_own_is_the_trainers_training|it_learns)\[(?!.*(full|bpt|loro))"
    # Triton's interpreter
    r"|test_(bpt_mlp|an_mlp|a_normed_mlp_with_its_residual)"
    # dry runs
    r"|test_the_peak_is_what_a_step_takes\[(?!full-8-4|loro-8-4)"
    r"|test_(people_read_a_table|as_json_has_every_number|what_cannot_be_estimated_is_named)"
    r"|test_a_rank_equal_to_the_tokens_or_to_another_matrix_is_told_apart"
    r"|test_(the_command_shows_the_search|a_terminal_shows_what_is_tried)"
    r"|test_(loro_s_exact_step_is_found|galore_s_new_bases_are_those|merges_are_counted_with)"
    r"|test_(bpt_s_merge_draws_a_frame|settings_that_compile_are_estimated|methods_without_events)"
    r"|test_(activations_that_are_computed_again|on_a_gpu_tensors_are_rounded_up)"
    r"|test_a_merge_takes_what_was_foretold\[(?!relora)"
    r"|test_(what_is_done_apart_is_an_event|every_phase_is_estimated|the_state_of_the_process_stays)"
    r"|test_low_rank_and_full_steps_cost_what_arithmetic_says"
    r"|test_the_steps_are_the_most_that_the_budget_pays"
    r"|test_the_last_row_has_the_flops_of_the_estimate"
    # methods of other packages
    r"|test_it_goes_through_every_command|test_it_keeps_the_laws\[(?!silu)"
    r"|test_(a_bad_package_is_named_and_takes|dropout_breaks_no_law|numbers_in_an_optimizers_state)"
    r"|test_the_sites_are_what_may_be_adapted_whether"
    # processes
    r"|test_a_warm_started_run_goes_on_on_two_ranks"
    r"|test_the_blocks_of_a_file_run_in_order\[docs/(methods|data|compare)"
    # benchmarks
    r"|test_(corruption|loop|speed|fast_forms|cpu_peft|merges|budget|first_table|data)$"
    r"|test_the_smoke_tests_runs_change_phase"
    # runs
    r"|test_once_there_is_a_checkpoint_the_source_may_go\[(?!relora)"
    r"|test_(a_wrong_fold_is_caught|methods_with_other_matrices_have_no_factorised)\w*\[(?!bpt|sltrain)"
    r"|test_the_factorised_model_computes_and_generates_the_same\[(?!loro-config)"
    r"|test_columns_that_other_operators_read_are_not_stacked"
    r"|test_(runs_resumes_and_exports_as_without|outputs_gradients_and_steps_are)\w*\[(?!full|lora)"
    r"|test_a_kill_around_an_event_changes_no_bit\[(?!relora|bpt)"
    r"|test_three_phases_and_a_kill_in_any_of_them\[(?!2)"
    r"|test_a_kill_near_the_boundary_costs_nothing\[(?!5)"
    r"|test_with_wsd_a_run_becomes_longer\w*\[(?!relora|full)"
    r"|test_the_configuration_of_(the|a)_run_replays_it\[(?!.*bpt)"
    r"|test_the_learning_rate_is_0_next_to_the_switch_and_to_each_reset\[(?!4)"
    r"|test_divergence_names_the_step_the_rate_and_the_last_good_checkpoint\[(?!100)"
    r"|test_accumulation_is_one_big_batch\[(?!bpt)"
    r"|test_a_resume_under_another_number_of_ranks_weighs"
    r"|test_before_the_first_checkpoint_the_source_is_read_again"
    r"|test_(what_rank_0_finds_ends_every_rank|what_can_not_be_drawn_is_one_line)"
    r"|test_(at_an_equal_budget_each_run_is_started|a_comparison_draws_beside_its_table)"
    r"|test_a_preset_says_which_sizes_of_a_recipe_it_leaves"
    r"|test_the_estimate_has_the_optimizers_bytes\[0.0"
    r"|test_(signals_save_first|what_is_offered_is_exact|lora_and_relora|bpt)(\[|$)"
    r"|test_(the_demo_trains_each_method|a_table_in_a_pipe|programs_read_json_and_nothing_else)"
    r"|test_a_recipe_says_what_it_is_and_what_it_counts\[(?!.*(60m-loro|60m-relora|pico))"
    r"|test_a_recipe_trains_at_a_smaller_size\[(?!.*(dora|60m|pico|qwen-100m))"
    r"|test_(the_function|the_first_loss)_is_that_of_the_source\[(?!full|relora-(full|relora|qwen2))"
    r"|test_what_needs_no_pytorch_does_not_wait_for_it\[(?!--help|recipes\])"
    r"|test_a_rank_too_large_names_the_largest_useful_one\[(?!relora|loro)"
    r"|test_a_run_is_measured_as_it_was_at_its_end\[(?!bpt|relora|loro)"
    r"|test_every_preset_has_its_closed_form\[(?!llama-60m)"
    r"|test_the_ablation_of_relora_is_settings\[(?!True-True|False-False)"
    r"|test_the_tolerance_lies_between_right_and_wrong_folds\[(?!bpt\]|loro\]|lowrank\])"
    r"|test_processes_that_never_come_are_waited_for_a_limited_time\[(?!True-1)"
    r"|test_an_absurd_learning_rate_leaves_no_broken_checkpoint\[(?!1)"
    r"|test_only_swiglu_is_fused\[(?!.*False)"
    r"|test_the_step_that_is_timed_is_the_trainers\[(?!full|bpt|relora|loro)"
    r"|test_nothing_in_a_checkpoint_can_be_left_out\[(?!.*bpt)"
)
"""Cases for the marker `slow`, beside those that carry it: the longest of their kind, by
`--durations`. What is left of a kind stays in the default run."""


EXHAUSTIVE = re.compile(
    r"test_every_preset_has_its_closed_form"
    r"|test_a_recipe_says_what_it_is_and_what_it_counts\[(?!loro-350m-loro\])"
    r"|test_the_counts_are_the_papers\[(?!.*350m)"
    r"|test_moments_come_back_in_the_dtype_that_they_had\[(?!bpt|lora)"
    r"|test_the_peak_is_what_a_step_takes\[(?!bpt|relora)"
    r"|test_a_kill_around_an_event_changes_no_bit\[(?!loro|galore)"
    r"|test_the_first_loss_is_that_of_the_source\[(?!full|lora)"
    r"|test_a_name_is_there_in_a_new_process_twice\[(?!train|METHODS)"
    r"|test_low_precision_trains_on_a_cpu\[(?!.*galore)"
    r"|test_accumulation_is_one_big_batch\[(?!full|loro|relora)"
    r"|test_a_method_keeps_the_laws_with_rates_of_their_own\[(?!.*(full|loro)\])"
    r"|test_a_method_keeps_the_laws_with_muon\[(?!.*(full|relora)\])"
    r"|test_the_configuration_of_(the|a)_run_replays_it\[(?!.*(full|loro|relora))"
    r"|test_lora_and_relora"
    r"|test_a_finished_run_that_is_given_more_steps\w*\[(?!relora|loro)"
    r"|test_(runs_resumes_and_exports_as_without|outputs_gradients_and_steps_are)\w*\[(?!bpt|loro)"
    r"|test_with_wsd_a_run_becomes_longer\w*\[(?!bpt|loro)"
    r"|test_with_the_same_settings_a_branch_becomes\w*\[(?!galore)"
    r"|test_a_run_killed_in_its_first_step_resumes\w*\[(?!galore)"
    r"|test_killed_at_any_step_of_the_way_it_becomes\w*\[(?!6|9)"
    r"|test_(recomputed_activations_change_no_loss|looking_at_a_training_changes_no_bit)"
    r"\[(?!.*galore)"
    r"|test_every_method_can_be_analyzed\[(?!.*(loro|galore))"
    r"|test_(a_loop_of_ones_own_is_the_trainers_training|it_learns)\[(?!.*galore)"
    r"|test_a_method_trains_and_its_run_is_evaluated_and_exported\[(?!.*(bpt|galore))"
    r"|test_the_factorised_model_computes_and_generates_the_same\[(?!loro|lowrank-olmo2)"
    r"|test_the_papers_memory"
    r"|test_the_function_is_that_of_the_source\[(?!lora|bpt)"
    r"|test_the_ablation_of_relora_is_settings|test_the_step_that_is_timed_is_the_trainers"
    r"|test_an_absurd_learning_rate_leaves_no_broken_checkpoint"
    r"|test_a_run_is_measured_as_it_was_at_its_end"
    r"|test_a_preset_says_which_sizes_of_a_recipe_it_leaves\[--model"
    r"|test_llama_7b_takes_seconds_and_less_than_2_gb\[(?!full)|test_they_are_so_for_more_runs"
    r"|test_a_comparison_at_an_equal_budget\[flops"
    r"|test_a_recipe_counts_the_parameters_of_the_model_that_it_names\[relora-t5-large-(?!relora)"
    r"|test_a_recipe_fine_tunes_a_smaller_model\[(?!loro-roberta-base-r4|relora-350m-glue-relora"
    r"|relora-t5-base-relora)"
    r"|test_a_thousand_mutated_files|test_five_hundred_mutated_lines"
)
"""Slow cases that the marker `exhaustive` leaves to a release: the others of a kind, of which some
are in the slow or the default run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", metavar="K/N",
                     help="run the K-th, (K+N)-th ... of the tests that were chosen")  # fmt: skip


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Mark the long cases, before pytest chooses by markers. Then keep those of the shard."""
    for item in items:
        if LONG.match(item.name):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") and EXHAUSTIVE.match(item.name):
            item.add_marker(pytest.mark.exhaustive)
    yield
    k, n = map(int, config.getoption("--shard").split("/"))
    items[:] = items[k - 1 :: n]


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """Make each fixture with the same random numbers, whatever was made before it."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Give each test the same random numbers, whatever ran before it in the same process."""
    _seed()


def _seed() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes milliseconds


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
def signals() -> Iterator[None]:
    """Signals do what they do in a terminal: a shell that starts the tests with `&` or under nohup
    has some of them ignored, here and in every process that is started."""
    usual = {signal.SIGINT: signal.default_int_handler}
    usual |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1), signal.SIG_DFL)
    before = {number: signal.signal(number, does) for number, does in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find the package that the tests find."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))
