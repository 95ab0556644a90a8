"""Every place that asks which device it is on is known, and has a test that takes the other way too."""

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
ASKING = ("autocast", "bf16_is_fast", "pin_memory", "sent")  # functions whose answer or effect depends on the device

COVERED = {  # function → the test that runs it on a (real or emulated) CUDA device
    "activation_store.ActivationsStore.__init__": "test_coders_train_on_another_device_than_their_target",
    "activation_store.ActivationsStore._harvest": "test_coders_train_on_another_device_than_their_target",
    "activation_store.ActivationsStore._put": "test_forwards_beside_the_steps_change_nothing",
    "activation_store.harvests_ahead": "test_forwards_beside_the_steps_change_nothing",
    "baselines.baselines": "test_the_main_job_on_the_device_gives_the_cpus_table",
    "devices.Aside.__init__": "test_forwards_beside_the_steps_change_nothing",
    "devices.Aside.begun": "test_forwards_beside_the_steps_change_nothing",
    "devices._join": "test_forwards_beside_the_steps_change_nothing",
    "activation_store.ActivationsStore._refill": "test_a_group_trains_on_the_device_as_on_the_cpu",
    "activation_store.ActivationsStore.load_state_dict": "test_an_interrupted_run_ends_on_the_device_as_if_it_had_not_been",
    "devices.bf16_is_fast": "test_activations_are_harvested_in_bf16_where_it_is_fast",
    "devices.check_device": "test_a_job_of_several_processes_is_refused_in_one_line",
    "devices.device_name": "test_the_main_job_on_the_device_gives_the_cpus_table",
    "devices.float32_through_onednn": "test_float32_products_are_float32s_whoever_makes_them",
    "devices.in_processes": "test_the_ruler_on_the_device_reads_what_it_reads_on_the_cpu",
    "devices.sent": "test_a_step_never_waits_for_the_device",
    "evaluation.sequences_at_once": "test_the_ruler_on_the_device_reads_what_it_reads_on_the_cpu",
    "features.main": "test_a_foreign_dictionary_is_measured_on_the_device_as_on_the_cpu",
    "losses._rows_at_once": "test_the_main_job_on_the_device_gives_the_cpus_table",
    "losses._cached": "test_the_ruler_on_the_device_reads_what_it_reads_on_the_cpu",
    "main.Settings": "test_the_main_job_on_the_device_gives_the_cpus_table",
    "measure.main": "test_a_foreign_dictionary_is_measured_on_the_device_as_on_the_cpu",
    "output_objective.TrainingPass.__call__": "test_the_main_job_on_the_device_gives_the_cpus_table",
    "output_objective._in_bf16": "test_the_main_job_on_the_device_gives_the_cpus_table",
    "parallel.joined": "test_processes_on_gpus_have_one_each",
    "patching.capture": "test_activations_are_harvested_in_bf16_where_it_is_fast",
    "recipes.train_decomposition": "test_the_main_job_on_the_device_gives_the_cpus_table",
    "sparse_c.takes": "test_sparse_codes_and_gradients_are_the_dense_twins",
    "sparse_encode._above": "test_sparse_codes_and_gradients_are_the_dense_twins",
    "sparse_encode._bounds_pay": "test_sparse_codes_and_gradients_are_the_dense_twins",
    "sparse_encode._kth_largest": "test_sparse_codes_and_gradients_are_the_dense_twins",
    "sparse_encode._largest": "test_sparse_codes_and_gradients_are_the_dense_twins",
    "sparse_encode._select": "test_sparse_codes_and_gradients_are_the_dense_twins",
    "sparse_ops.Layout.__init__": "test_sparse_codes_and_gradients_are_the_dense_twins",
    "sparse_ops.from_dense": "test_a_step_on_the_device_is_the_cpus",
    "sparse_ops.nonzero_positions": "test_sparse_codes_and_gradients_are_the_dense_twins",
    "sparse_ops.pair_dots": "test_sparse_codes_and_gradients_are_the_dense_twins",
    "sparse_ops.segment_sums": "test_sparse_codes_and_gradients_are_the_dense_twins",
    "sparse_triton.triton_candidates_by_token": "test_selection_by_bounds_is_that_of_float64",
    "sparse_triton.triton_candidates_in_batch": "test_selection_by_bounds_is_that_of_float64",
    "sparse_triton.triton_pair_dots": "test_a_product_of_pairs_is_plain_indexing",
    "sparse_triton.triton_segment_sums": "test_a_sum_over_segments_is_plain_indexing",
    "sparse_triton.triton_pre_activations": "test_selection_by_bounds_is_that_of_float64",
    "sparse_triton.triton_upper_bounds": "test_selection_by_bounds_is_that_of_float64",
    "sparse_triton.triton_winners_by_token": "test_selection_by_bounds_is_that_of_float64",
    "spd_training.SPDTrainer.__init__": "test_an_spd_step_on_the_device_is_the_cpus",
    "spd_training.SPDTrainer.importances": "test_spd_trains_in_bf16_where_asked_and_keeps_its_weights_in_float32",
    "spd_training.SPDTrainer.run_gated": "test_an_spd_step_never_waits_for_the_device",
    "spd_training.SPDTrainer.run": "test_spd_trains_in_bf16_where_asked_and_keeps_its_weights_in_float32",
    "spd_variants.BatchNoise.uniform": "test_the_ruler_on_the_device_reads_what_it_reads_on_the_cpu",
    "step_graphs.RecordedStep.__call__": "test_a_recorded_step_is_the_step_itself",
    "step_graphs.RecordedStep.__init__": "test_a_recorded_step_is_the_step_itself",
    "step_graphs._recorded": "test_a_recorded_step_is_the_step_itself",
    "step_graphs._keeper": "test_a_recorded_step_is_the_step_itself",
    "step_graphs.records_graphs": "test_a_recorded_step_is_the_step_itself",
    "training._side_by_side": "test_a_group_trains_on_the_device_as_on_the_cpu",
}


def asks(node: ast.AST) -> bool:
    """Does this expression look at a device, make something for one device type, or choose a precision by it?"""
    if isinstance(node, ast.Attribute):
        text = ast.unparse(node)
        return (
            node.attr in ("is_cuda", "is_cpu")
            or (node.attr == "type" and ast.unparse(node.value).endswith("device"))
            or text.startswith(("torch.cuda.", "torch.cpu.", "torch.backends."))
        )
    if not isinstance(node, ast.Call):
        return False
    function, arguments = ast.unparse(node.func), [ast.unparse(argument) for argument in node.args]
    name = function.rpartition(".")[2]
    makes = function == "torch.Generator" and bool(arguments)
    return name in ASKING or makes or (name == "startswith" and arguments == ["'cuda'"])


def asking_functions(tree: ast.AST, name: str) -> Iterator[str]:
    """Qualified names of the innermost functions and classes (or the module itself) that ask."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield from asking_functions(child, f"{name}.{child.name}")
        else:
            if asks(child):
                yield name
            yield from asking_functions(child, name)


def test_every_branch_on_a_device_is_covered_by_a_named_test() -> None:
    found = {
        name for file in REPOSITORY.glob("*.py") for name in asking_functions(ast.parse(file.read_text()), file.stem)
    }
    assert found == COVERED.keys(), f"not listed: {found - COVERED.keys()}; gone: {COVERED.keys() - found}"
    tests = {
        node.name
        for file in (REPOSITORY / "tests").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)
    }  # fmt: skip
    assert set(COVERED.values()) <= tests, f"no such test: {set(COVERED.values()) - tests}"
