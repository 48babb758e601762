"""Would the tests notice? Mistakes made in a copy of the project, and the test that fails then.

``pytest -m mutation tests/test_mutations.py`` makes them one by one (``-k hop``: only some) and prints
``caught n of m``, in minutes. What is quick runs with all other tests: every mistake must still fit the code.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mutation_run import run_tests

from fma_nb.project import project_root
from fma_nb.raw.mini import make_fma_mini

COPIED = ("fma_nb", "notebooks", "tests", "pyproject.toml")
TESTS_FAILED = 1  # pytest's exit status; any other one but 0 says that the tests could not be run


@dataclass(frozen=True)
class Mistake:
    """A text of a file, which must occur there once, what stands there by mistake, and what notices."""

    name: str
    file: str
    old: str
    new: str
    caught_by: str


MISTAKES = [
    # ----- metadata and the synthetic dataset -----
    Mistake(
        "val and test swapped",
        "fma_nb/metadata.py",
        '"validation": "val", "test": "test"',
        '"validation": "test", "test": "val"',
        "tests/test_metadata.py::test_subsets_are_nested",
    ),
    Mistake(
        "artists in two splits accepted",
        "fma_nb/metadata.py",
        "shared = splits.index[splits > 1]",
        "shared = splits.index[splits > len(SPLITS)]",
        "tests/test_metadata.py::test_damaged_metadata_is_one_clear_sentence",
    ),
    Mistake(
        "tracks instead of artists dealt to the splits",
        "fma_nb/raw/clips.py",
        "kind = (split, sample_rate, bit_rate,",
        "kind = (list(n_artists)[place % 3], sample_rate, bit_rate,",
        "tests/test_mini.py::test_artists_never_cross_splits",
    ),
    Mistake(
        "duplicates in the index accepted",
        "fma_nb/metadata.py",
        'twice := rows["track_id"][rows["track_id"].duplicated()].tolist()',
        'twice := rows["track_id"][rows.duplicated(INDEX_COLUMNS)].tolist()',
        "tests/test_metadata.py::test_genres_outside_the_eight_belong_to_larger_sets",
    ),
    Mistake(
        "broken clips kept because ids are compared with texts",
        "fma_nb/metadata.py",
        "if track_id in ERRATA:",
        "if str(track_id) in ERRATA:",
        "tests/test_metadata.py::test_broken_clips_are_dropped_and_told",
    ),
    Mistake(
        "subsets not nested",
        "fma_nb/metadata.py",
        '"fma_medium": ("small", "medium")',
        '"fma_medium": ("medium",)',
        "tests/test_metadata.py::test_subsets_are_nested",
    ),
    # ----- audio -----
    Mistake(
        "left channel instead of the mean",
        "fma_nb/audio.py",
        "return functools.reduce(np.add, channels.T) / np.float32(channels.shape[1])",
        "return channels[:, 0]",
        "tests/test_audio.py::test_channels_are_averaged",
    ),
    Mistake(
        "resampling skipped",
        "fma_nb/audio.py",
        'return soxr.resample(samples, rate, wanted, quality="HQ"), wanted',
        "return samples, wanted",
        "tests/test_audio.py::test_resampling_is_librosas",
    ),
    Mistake(
        "truncated clips filled up with zeros",
        "fma_nb/audio.py",
        'raise UnreadableClipError(f"cut off ({decoded:.1f} s of {promised:.1f} s)")',
        "channels = np.pad(channels, ((0, round((promised - decoded) * rate)), (0, 0)))",
        "tests/test_audio.py::test_a_cut_mp3_is_refused_but_gives_what_is_left_of_it_when_asked",
    ),
    # ----- spectrogram -----
    Mistake(
        "wrong hop",
        "fma_nb/spectrogram.py",
        "hop_length: int = 512",
        "hop_length: int = 511",
        "notebooks/02_spectrograms.ipynb",
    ),
    Mistake(
        "HTK's mel scale instead of Slaney's",
        "fma_nb/spectrogram.py",
        "edges = _mel_to_hz(np.linspace(0, _hz_to_mel(sample_rate / 2), n_mels + 2))[:, None]",
        "edges = 700 * (np.geomspace(1, 1 + sample_rate / 1400, n_mels + 2)[:, None] - 1)",
        "tests/test_spectrogram.py::test_the_filter_bank_is_librosas_and_torchaudios",
    ),
    Mistake(
        "mel filters of equal height instead of equal area",
        "fma_nb/spectrogram.py",
        "np.maximum(triangles, 0) * 2 / (upper - lower)",
        "np.maximum(triangles, 0)",
        "tests/test_spectrogram.py::test_the_filter_bank_is_librosas_and_torchaudios",
    ),
    Mistake(
        "frames not centred",
        "fma_nb/spectrogram.py",
        "padded = np.pad(samples, preset.n_fft // 2)",
        "padded = samples",
        "tests/test_spectrogram.py::test_thirty_seconds_have_1292_frames",
    ),
    Mistake(
        "decibels relative to 1 instead of the clip's maximum",
        "fma_nb/spectrogram.py",
        "reference = float(power.max())",
        "reference = 1.0",
        "tests/test_spectrogram.py::test_volume_does_not_matter",
    ),
    Mistake(
        "reference from the kept frames only",
        "fma_nb/spectrogram.py",
        "reference = float(power.max())",
        "reference = float(power[:, frame_indices(power.shape[1], preset)].max())",
        "tests/test_spectrogram.py::test_the_reference_is_the_maximum_of_all_frames",
    ),
    Mistake(
        "power taken for amplitude",
        "fma_nb/spectrogram.py",
        "db = 10 * np.log10(",
        "db = 20 * np.log10(",
        "tests/test_spectrogram.py::test_images_equal_librosas",
    ),
    Mistake(
        "flipped frequency axis",
        "fma_nb/spectrogram.py",
        "grey = (db[::-1] + DYNAMIC_RANGE_DB)",
        "grey = (db + DYNAMIC_RANGE_DB)",
        "notebooks/02_spectrograms.ipynb",
    ),
    Mistake(
        "compact frames taken from the start of their stretches",
        "fma_nb/spectrogram.py",
        "((np.arange(preset.n_frames) + 0.5) * n_frames",
        "(np.arange(preset.n_frames) * n_frames",
        "tests/test_spectrogram.py::test_thirty_seconds_have_1292_frames",
    ),
    # ----- dataset -----
    Mistake(
        "labels sorted differently",
        "fma_nb/bulk/pack.py",
        'genres, splits = sorted(set(rows["genre"])),',
        'genres, splits = sorted(set(rows["genre"]), key=str.lower),',
        "tests/test_pack.py::test_labels_are_in_alphabetical_order",
    ),
    Mistake(
        "levels standardised over the batch instead of each track",
        "fma_nb/dataset.py",
        "return images.unsqueeze(1).float().div_(255)",
        "return (images.unsqueeze(1).float() - images.float().mean()) / images.float().std()",
        "tests/test_dataset.py::test_grey_levels_become_numbers_from_0_to_1",
    ),
    Mistake(
        "a stale pack used although PNGs have changed",
        "fma_nb/bulk/pack.py",
        ' and record["state"] == state',
        "",
        "tests/test_pack.py::test_the_pack_follows_the_pngs",
    ),
    Mistake(
        "a fingerprint of pixels without labels",
        "fma_nb/bulk/pack.py",
        'digest.update(f"{row.track_id}/{row.split}/{row.genre}".encode())',
        'digest.update(f"{row.track_id}/{row.split}".encode())',
        "tests/test_pack.py::test_the_fingerprint_tells_of_a_label_alone",
    ),
    Mistake(
        "a fingerprint that the test split changes",
        "fma_nb/bulk/pack.py",
        'if split != "test":',
        "if split:",
        "tests/test_pack.py::test_the_fingerprint_does_not_know_of_the_test_split",
    ),
    Mistake(
        "shorter clips filled up with silence",
        "fma_nb/bulk/pack.py",
        ', mode="wrap").tobytes()',
        ").tobytes()",
        "tests/test_pack.py::test_a_shorter_clip_is_repeated",
    ),
    Mistake(
        "images in another order than their labels",
        "fma_nb/dataset.py",
        "return self.images[chosen], self.labels[chosen]",
        "return self.images[chosen.sort().values], self.labels[chosen]",
        "tests/test_dataset.py::test_batches_equal_single_clips",
    ),
    # ----- model -----
    Mistake(
        "softmax inside the network",
        "fma_nb/model.py",
        "return self.classifier(x.flatten(1))",
        "return self.classifier(x.flatten(1)).softmax(1)",
        "tests/test_model.py::test_outputs_are_logits",
    ),
    Mistake(
        "GRU read at its last step only",
        "fma_nb/model.py",
        "        mean = sequence.mean(dim=1)\n",
        "        sequence = sequence[:, -1:]\n        mean = sequence.mean(dim=1)\n",
        "tests/test_model.py::test_the_gru_is_read_at_every_step",
    ),
    Mistake(
        "GRU of one direction called bidirectional",
        "fma_nb/model.py",
        'bidirectional=recurrence != "one_way")',
        "bidirectional=False)",
        "tests/test_model.py::test_a_variant_differs_in_one_thing",
    ),
    Mistake(
        "batch and time of the GRU mixed up",
        "fma_nb/model.py",
        "return kind(n_in, n_hidden, batch_first=True,",
        "return kind(n_in, n_hidden, batch_first=False,",
        "tests/test_model.py::test_clips_of_a_batch_do_not_know_of_each_other",
    ),
    Mistake(
        "dropout left on",
        "fma_nb/model.py",
        "return self.classifier(self.dropout(self.embed(sequence)))",
        "return self.classifier(nn.functional.dropout(self.embed(sequence), self.dropout.p))",
        "tests/test_model.py::test_the_shuffled_crnn_is_the_crnn_on_shuffled_frames",
    ),
    Mistake(
        "band normalisation over all bands at once",
        "fma_nb/model.py",
        "x = self.band_norm(x.squeeze(1)).unsqueeze(1)",
        "x = (x - x.mean()) / x.std() if isinstance(self.band_norm, nn.BatchNorm1d) else x",
        "tests/test_model.py::test_band_norm_takes_the_level_and_the_spread_out_of_every_mel_band",
    ),
    Mistake(
        "batch normalisation that remembers the last batch only",
        "fma_nb/model.py",
        "nn.BatchNorm2d(n_out),",
        "nn.BatchNorm2d(n_out, momentum=1.0),",
        "tests/test_model.py::test_batch_normalisation_remembers_a_tenth_of_every_batch",
    ),
    # ----- training -----
    Mistake(
        "softmax before cross-entropy",
        "fma_nb/training.py",
        "logits = state.model(inputs).float()",
        "logits = state.model(inputs).float().softmax(1)",
        "tests/test_training.py::test_an_epoch_is_the_one_made_by_hand",
    ),
    Mistake(
        "gradients of earlier batches kept",
        "fma_nb/training.py",
        "        state.optimizer.zero_grad()\n",
        "",
        "tests/test_training.py::test_an_epoch_is_the_one_made_by_hand",
    ),
    Mistake(
        "loss of a shorter last batch counted as that of a full one",
        "fma_nb/training.py",
        "losses.append(loss.detach() * len(labels))",
        "losses.append(loss.detach() * recipe.batch_size)",
        "tests/test_training.py::test_an_epoch_is_the_one_made_by_hand",
    ),
    Mistake(
        "label smoothing ignored",
        "fma_nb/training.py",
        "F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)",
        "F.cross_entropy(logits, targets)",
        "tests/test_training.py::test_an_epoch_is_the_one_made_by_hand",
    ),
    Mistake(
        "mixup of images without their labels",
        "fma_nb/augmentation.py",
        "torch.lerp(one_hot.roll(1, 0), one_hot, weight)",
        "one_hot",
        "tests/test_training.py::test_soft_targets_are_the_loss_of_two_labels",
    ),
    Mistake(
        "mixed labels not learned from",
        "fma_nb/training.py",
        "loss = F.cross_entropy(logits, targets,",
        "loss = F.cross_entropy(logits, labels,",
        "tests/test_training.py::test_an_epoch_is_the_one_made_by_hand",
    ),
    Mistake(
        "mixup on evaluation",
        "fma_nb/training.py",
        "logits.append(model(to_input(images)).float())",
        "logits.append(model(to_input(images).lerp(to_input(images.roll(1, 0)), 0.3)).float())",
        "tests/test_training.py::test_a_clip_is_evaluated_on_its_own",
    ),
    Mistake(
        "eval() missing in evaluation",
        "fma_nb/training.py",
        "    model.eval()\n    logits, targets",
        "    logits, targets",
        "tests/test_training.py::test_evaluation_changes_nothing_and_drops_nothing",
    ),
    Mistake(
        "validation on the training clips",
        "fma_nb/runs/fit.py",
        'make_loader(clips["val"], 256)',
        'make_loader(clips["train"], 256)',
        "tests/test_fit.py::test_the_best_checkpoint_is_chosen_on_validation_alone",
    ),
    Mistake(
        "best checkpoint chosen on train accuracy",
        "fma_nb/runs/fit.py",
        'accuracy, loss = row["val_accuracy"], row["val_loss"]',
        'accuracy, loss = row["train_accuracy"], row["train_loss"]',
        "tests/test_fit.py::test_the_best_checkpoint_is_chosen_on_validation_alone",
    ),
    Mistake(
        "last epoch kept as the best",
        "fma_nb/runs/fit.py",
        'if (accuracy, -loss) > (best["best_accuracy"], -best["best_loss"]):',
        "if row:",
        "tests/test_fit.py::test_the_best_checkpoint_is_chosen_on_validation_alone",
    ),
    Mistake(
        "seed not set",
        "fma_nb/training.py",
        "    torch.manual_seed(mixed)\n",
        "",
        "tests/test_training.py::test_a_second_run_gives_the_same_files",
    ),
    Mistake(
        "weights not seeded",
        "fma_nb/training.py",
        "    seed_everything(recipe.seed)\n    model",
        "    model",
        "tests/test_training.py::test_a_second_run_gives_the_same_files",
    ),
    Mistake(
        "the same draws in every epoch",
        "fma_nb/runs/fit.py",
        "seed_everything(recipe.seed, epoch + 1)",
        "seed_everything(recipe.seed)",
        "tests/test_training.py::test_every_epoch_draws_anew",
    ),
    Mistake(
        "resume that forgets the optimizer",
        "fma_nb/runs/fit.py",
        '    state.optimizer.load_state_dict(last["optimizer_state"])\n',
        "",
        "tests/test_fit.py::test_a_killed_run_goes_on_to_the_same_files",
    ),
    Mistake(
        "resume that forgets the schedule",
        "fma_nb/runs/fit.py",
        '    state.scheduler.load_state_dict(last["scheduler_state"])\n',
        "",
        "tests/test_fit.py::test_a_killed_run_goes_on_to_the_same_files",
    ),
    Mistake(
        "checkpoints of other data gone on from",
        "fma_nb/runs/fit.py",
        '(one["config"], one.get("fingerprint")) == ours for one',
        'one["config"] == ours[0] for one',
        "tests/test_fit.py::test_other_data_starts_over",
    ),
    Mistake(
        "averaged weights not evaluated",
        "fma_nb/training.py",
        "return self.model if self.average is None else self.average.module",
        "return self.model",
        "tests/test_optimization.py::test_the_average_is_what_is_judged_and_kept",
    ),
    Mistake(
        "BatchNorm statistics left out of the average",
        "fma_nb/optimization.py",
        "averages, weights = self.module.state_dict(), model.state_dict()",
        "averages, weights = dict(self.module.named_parameters()), dict(model.named_parameters())",
        "tests/test_optimization.py::test_the_average_is_the_one_made_by_hand",
    ),
    Mistake(
        "warm-up missing",
        "fma_nb/optimization.py",
        "rise = max(1, round(warmup * n_steps))",
        "rise = 0",
        "tests/test_optimization.py::test_the_learning_rate_rises_and_falls_as_a_cosine",
    ),
    Mistake(
        "schedule never stepped",
        "fma_nb/training.py",
        "        state.scheduler.step()\n",
        "",
        "tests/test_optimization.py::test_the_log_tells_the_learning_rate",
    ),
    Mistake(
        "weight decay coupled to the gradient",
        "fma_nb/optimization.py",
        'torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW',
        "torch.optim.Adam",
        "tests/test_recipe.py::test_the_ingredients_are_used_in_training",
    ),
    Mistake(
        "crop outside the clip",
        "fma_nb/augmentation.py",
        "n_frames if recipe.time_shift else n_frames - n_kept + 1",
        "n_frames",
        "tests/test_augmentation.py::test_a_crop_is_a_stretch_of_each_clip_from_a_random_start",
    ),
    Mistake(
        "crop that never reaches the end of the clip",
        "fma_nb/augmentation.py",
        "n_frames - n_kept + 1",
        "n_frames - n_kept",
        "tests/test_augmentation.py::test_a_crop_is_a_stretch_of_each_clip_from_a_random_start",
    ),
    Mistake(
        "time shift along the mel axis",
        "fma_nb/augmentation.py",
        "% n_frames\n        images = images.gather(2, frames[:, None, :].expand(-1, n_mels, -1))",
        "% n_mels\n        images = images.gather(1, frames[:, :n_mels, None].expand(-1, -1, n_frames))",
        "tests/test_augmentation.py::test_shifting_rotates_every_clip_on_its_own",
    ),
    Mistake(
        "one speed for the whole batch",
        "fma_nb/augmentation.py",
        "speed = 1 + recipe.stretch * (2 * draw[1] - 1)",
        "speed = 1 + recipe.stretch * (2 * draw[1, 0] - 1)",
        "tests/test_augmentation.py::test_stretching_plays_every_clip_at_its_own_speed",
    ),
    Mistake(
        "stretch along the mel axis too",
        "fma_nb/augmentation.py",
        "bands = (torch.arange(n_mels, device=images.device) + shift)",
        "bands = (speed * torch.arange(n_mels, device=images.device) + shift).long()",
        "tests/test_augmentation.py::test_shifts_and_speeds_are_drawn_apart",
    ),
    Mistake(
        "mask over frequency laid over time",
        "fma_nb/augmentation.py",
        "torchaudio.transforms.FrequencyMasking(",
        "torchaudio.transforms.TimeMasking(",
        "tests/test_augmentation.py::test_masks_blank_one_stretch_of_each_clip",
    ),
    Mistake(
        "equalizer that fills silence",
        "fma_nb/augmentation.py",
        "return torch.where(inputs > 0, inputs + curve[:, None, :, None], 0).clamp_(min=0)",
        "return (inputs + curve[:, None, :, None]).clamp_(min=0)",
        "tests/test_augmentation.py::test_the_equalizer_leaves_silence_silent",
    ),
    # ----- evaluation -----
    Mistake(
        "predictions shuffled against track ids",
        "fma_nb/evaluation.py",
        "loader = make_loader(SpectrogramDataset(clips, device), 256)",
        "loader = make_loader(SpectrogramDataset(clips, device), 256, shuffle=True)",
        "tests/test_evaluation.py::test_scores_follow_from_the_predictions",
    ),
    Mistake(
        "last checkpoint evaluated instead of the best",
        "fma_nb/runs/fit.py",
        "kept, log = load_checkpoint(files.best)",
        "kept, log = load_checkpoint(files.last)",
        "tests/test_evaluation.py::test_the_best_checkpoint_is_evaluated_and_not_the_last",
    ),
    Mistake(
        "F1 weighted by genre size called macro-F1",
        "fma_nb/evaluation.py",
        'average="macro"',
        'average="weighted"',
        "tests/test_evaluation.py::test_scores_follow_from_the_predictions",
    ),
    Mistake(
        "a metrics file of another run accepted",
        "fma_nb/runs/experiment.py",
        'for key in ("dataset", "preset", "genres", "fingerprint", "labels"):',
        'for key in ("dataset", "preset", "genres", "labels"):',
        "tests/test_evaluation.py::test_metrics_of_other_data_are_refused",
    ),
    Mistake(
        "off by one in McNemar's table",
        "fma_nb/evaluation.py",
        "int((a & ~b).sum()), int((~a & b).sum())",
        "int((a & ~b)[1:].sum()), int((~a & b)[1:].sum())",
        "tests/test_evaluation.py::test_mcnemar_counts_every_clip",
    ),
    Mistake(
        "recall called precision",
        "fma_nb/evaluation.py",
        'table["genre"], table["predicted"], labels=metrics["genres"]',
        'table["predicted"], table["genre"], labels=metrics["genres"]',
        "tests/test_evaluation.py::test_genre_report_averages_over_seeds",
    ),
    Mistake(
        "spread of a population instead of a sample",
        "fma_nb/evaluation.py",
        "np.std(values, ddof=1)",
        "np.std(values)",
        "tests/test_evaluation.py::test_result_summary_has_a_row_a_model",
    ),
    Mistake(
        "bootstrap over tracks instead of artists",
        "fma_nb/evaluation.py",
        "    drawn = _draw(len(set(artists)), N_RESAMPLES, rng)\n    resampled",
        "    artists = range(len(artists))\n    drawn = _draw(len(artists), N_RESAMPLES, rng)\n    resampled",
        "tests/test_evaluation.py::test_bootstrap_by_artist_is_wider_when_artists_agree",
    ),
    Mistake(
        "other artists drawn for each of two paired models",
        "fma_nb/evaluation.py",
        "(_accuracies(matrix, artists, genres, drawn) for",
        "(_accuracies(matrix, artists, genres, _draw(drawn.shape[1], N_RESAMPLES, rng)) for",
        "tests/test_evaluation.py::test_a_model_does_not_differ_from_itself",
    ),
    Mistake(
        "other artists drawn for each of two models in the balanced difference alone",
        "fma_nb/evaluation.py",
        "genres, drawn) for matrix",
        "genres, drawn if genres is None else rng.permuted(drawn, axis=1)) for matrix",
        "tests/test_evaluation.py::test_a_model_does_not_differ_from_itself",
    ),
    Mistake(
        "clips weighted by artist over all genres at once",
        "fma_nb/evaluation.py",
        'clips.groupby(["label", "artist"])',
        'clips.groupby(["artist"])',
        "tests/test_evaluation.py::test_artists_count_equally_within_a_genre_and_genres_equally",
    ),
    Mistake(
        "clips instead of artists counted in the balanced interval",
        "fma_nb/evaluation.py",
        "sums = sums / np.maximum(sums[-1], 1)",
        "sums = sums / 1",
        "tests/test_evaluation.py::test_the_interval_of_the_balanced_accuracy_is_that_of_a_slow_bootstrap",
    ),
    Mistake(
        "genres weighted by their artists in the balanced interval",
        "fma_nb/evaluation.py",
        "np.nanmean(totals[:, :-1] / totals[:, -1:], axis=2)",
        "totals[:, :-1].sum(axis=2) / totals[:, -1:].sum(axis=2)",
        "tests/test_evaluation.py::test_the_interval_of_the_balanced_accuracy_is_that_of_a_slow_bootstrap",
    ),
    Mistake(
        "artists counted however uneven they are",
        "fma_nb/evaluation.py",
        "float(sizes.sum() ** 2 / (sizes**2).sum())",
        "float(len(sizes))",
        "tests/test_evaluation.py::test_effective_artists_by_hand",
    ),
    Mistake(
        "metrics without artists accepted",
        "fma_nb/runs/experiment.py",
        'if "artists" not in metrics:',
        'if "artist" in metrics:',
        "tests/test_evaluation.py::test_metrics_of_other_data_are_refused",
    ),
    Mistake(
        "an artist split over folds",
        "fma_nb/runs/ablation.py",
        "clips.labels, clips.artists))",
        "clips.labels, clips.track_ids))",
        "tests/test_folds.py::test_no_artist_is_torn_apart_not_even_one_of_train_and_val",
    ),
    Mistake(
        "folds not balanced by genre",
        "fma_nb/runs/ablation.py",
        "cutter.split(clips.track_ids, clips.labels,",
        "cutter.split(clips.track_ids, 0 * clips.labels,",
        "tests/test_folds.py::test_folds_are_balanced_by_genre",
    ),
    Mistake(
        "validation clips missing from the folds",
        "fma_nb/runs/ablation.py",
        'for name in ("train", "val")]',
        'for name in ("train",)]',
        "tests/test_folds.py::test_folds_hold_each_clip_of_train_and_val_once_and_none_of_test",
    ),
    Mistake(
        "a fold trained on the clips it is judged by",
        "fma_nb/runs/ablation.py",
        '"train": clips.take(~inside)',
        '"train": clips',
        "tests/test_folds.py::test_folds_hold_each_clip_of_train_and_val_once_and_none_of_test",
    ),
    Mistake(
        "one fingerprint for all folds",
        "fma_nb/runs/ablation.py",
        "content = pack.fingerprint + json.dumps(held_out.tolist())",
        "content = pack.fingerprint",
        "tests/test_folds.py::test_a_fold_is_never_taken_for_other_data",
    ),
    Mistake(
        "a fold lost when they are pooled",
        "fma_nb/runs/ablation.py",
        "for part in parts for key, value in",
        "for part in parts[1:] for key, value in",
        "tests/test_folds.py::test_pooled_folds_hold_each_clip_once",
    ),
    Mistake(
        "folds of different recipes pooled",
        "fma_nb/runs/ablation.py",
        "return found if all(one == made[0] for one in made) else []",
        "return found",
        "tests/test_folds.py::test_folds_that_were_made_differently_are_not_pooled",
    ),
    Mistake(
        "spread over folds called the standard error",
        "fma_nb/runs/tables.py",
        "np.std(folds, ddof=1) / len(folds) ** 0.5",
        "np.std(folds, ddof=1)",
        "tests/test_folds.py::test_the_tables_say_what_the_folds_found",
    ),
    Mistake(
        "two trainings at a time in a worker of the cluster",
        "fma_nb/bulk/workers.py",
        "if get_worker().state.nthreads > 1:",
        "if get_worker().state.nthreads > 2:",
        "tests/test_folds.py::test_a_worker_of_two_threads_is_refused",
    ),
    Mistake(
        "temperature multiplied instead of divided",
        "fma_nb/calibration.py",
        "scipy.special.softmax(logits / temperature, axis=1)",
        "scipy.special.softmax(logits * temperature, axis=1)",
        "tests/test_calibration.py::test_a_temperature_divides_the_logits_and_keeps_the_answer",
    ),
    Mistake(
        "temperature fitted on the test split",
        "fma_nb/commands/predict.py",
        'fit_temperature(*probabilities_and_labels(metrics, "val"))',
        'fit_temperature(*probabilities_and_labels(metrics, "test"))',
        "tests/test_predict.py::test_the_exported_temperature_is_fitted_on_validation",
    ),
    Mistake(
        "rows of another recipe compared",
        "fma_nb/runs/ablation.py",
        "return bool(config == wanted and metrics",
        "return bool(metrics",
        "tests/test_ablation.py::test_a_row_made_with_another_recipe_is_left_out",
    ),
    Mistake(
        "folds judged by their best epoch",
        "fma_nb/runs/ablation.py",
        "last_epoch=is_fold",
        "last_epoch=False",
        "tests/test_folds.py::test_folds_are_judged_after_their_last_epoch",
    ),
    Mistake(
        "eval() missing in prediction",
        "fma_nb/runs/checkpoint.py",
        "return network.eval()",
        "return network",
        "tests/test_predict.py::test_the_shipped_network_is_in_evaluation_mode",
    ),
    Mistake(
        "windows cut from a song at its own sample rate",
        "fma_nb/commands/predict.py",
        "load_windows(path, preset.sample_rate or USUAL_RATE)",
        "load_windows(path, preset.sample_rate)",
        "tests/test_predict.py::test_any_audio_gives_eight_probabilities",
    ),
    Mistake(
        "confusion matrix transposed",
        "fma_nb/plots.py",
        'confusion_matrix(table["genre"], table["predicted"]',
        'confusion_matrix(table["predicted"], table["genre"]',
        "tests/test_plots.py::test_a_row_of_the_confusion_matrix_is_a_true_genre",
    ),
    # ----- notebooks -----
    Mistake(
        "the run key looks at the flat files only",
        "fma_nb/commands/notebooks.py",
        '.rglob("*")',
        '.glob("*")',
        "tests/test_run.py::test_an_edited_room_makes_notebooks_run_again",
    ),
    Mistake(
        "decibels relative to 1 in notebook 02",
        "notebooks/02_spectrograms.ipynb",
        "np.maximum(mel, 1e-10) / mel.max()",
        "np.maximum(mel, 1e-10)",
        "notebooks/02_spectrograms.ipynb",
    ),
    Mistake(
        "artists of validation looked up in validation in notebook 01",
        "notebooks/01_eda.ipynb",
        'return val[\\"artist_id\\"].isin(train[\\"artist_id\\"]).mean()',
        'return val[\\"artist_id\\"].isin(val[\\"artist_id\\"]).mean()',
        "notebooks/01_eda.ipynb",
    ),
    Mistake(
        "softmax inside notebook 03's network",
        "notebooks/03_baseline.ipynb",
        "return self.classifier(x.flatten(1))",
        "return self.classifier(x.flatten(1)).softmax(1)",
        "tests/test_notebooks.py::test_the_baseline_of_notebook_03_is_the_packages",
    ),
    Mistake(
        "eval() missing in notebook 03's evaluation",
        "notebooks/03_baseline.ipynb",
        "network.eval()  # dropout off",
        "network.train()",
        "tests/test_notebooks.py::test_the_loop_of_notebook_03_is_the_packages",
    ),
    Mistake(
        "GRU read at its last step only in notebook 04",
        "notebooks/04_crnn.ipynb",
        "x = torch.cat([x.mean(dim=1), x.amax(dim=1)], dim=1)",
        "x = torch.cat([x[:, -1], x[:, -1]], dim=1)",
        "tests/test_notebooks.py::test_the_crnn_of_notebook_04_is_the_packages",
    ),
    Mistake(
        "planted calls at fixed distances in notebook 05",
        "notebooks/05_comparison.ipynb",
        "place + rng.integers(-2, 2)",
        "place",
        "tests/test_notebooks.py::test_the_place_in_the_stride_tells_nothing_about_the_planted_order",
    ),
    Mistake(
        "planted calls so near that a convolution sees two in notebook 05",
        "notebooks/05_comparison.ipynb",
        "zip((0, 43, 85), order",
        "zip((0, 30, 60), order",
        "tests/test_notebooks.py::test_no_convolution_sees_two_planted_calls",
    ),
]


# ----- quick: the table fits the code -----


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_the_mistake_can_still_be_made(mistake: Mistake) -> None:
    root = project_root()
    assert (root / mistake.file).read_text().count(mistake.old) == 1
    assert mistake.new != mistake.old
    file, *test = mistake.caught_by.split("::")
    assert all(f"def {name}(" in (root / file).read_text() for name in test)


def test_no_mistake_stands_in_the_table_twice() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)
    assert len({(mistake.file, mistake.old, mistake.new) for mistake in MISTAKES}) == len(MISTAKES)


# ----- slow: the mistakes are made -----


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A ``raw/`` folder with fma_mini, which the notebooks read: the project's MP3s, or new ones."""
    data = tmp_path_factory.mktemp("data")
    for name in ("fma_mini", "fma_mini_metadata"):
        if (made := project_root() / "data" / "raw" / name).exists():
            shutil.copytree(made, data / "raw" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMA_NB_DATA", str(data))
        make_fma_mini(progress=False)
    yield data / "raw"
    shutil.rmtree(data)


@pytest.fixture
def copy(tmp_path: Path, raw: Path) -> Iterator[Path]:
    """A copy of the project with a ``data/`` and ``outputs/`` of its own."""
    root = tmp_path.resolve() / "copy"
    for name in COPIED:
        original = project_root() / name
        if original.is_dir():
            shutil.copytree(original, root / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(original, root / name)
    (root / "data").mkdir()
    (root / "data" / "raw").symlink_to(raw)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """What caught each mistake, empty where nothing did; shown at the end."""
    caught: dict[str, str] = {}
    yield caught
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *(f"{name}: {test or 'NOT CAUGHT'}" for name, test in caught.items()), sep="\n")
        print(f"caught {sum(map(bool, caught.values()))} of {len(caught)}")


@pytest.mark.mutation
def test_without_a_mistake_everything_passes(copy: Path) -> None:
    selections = {mistake.caught_by for mistake in MISTAKES}
    notebooks = {selection for selection in selections if selection.endswith(".ipynb")}
    for together in (sorted(selections - notebooks), *([notebook] for notebook in sorted(notebooks))):
        status, printed = run_tests(copy, *together)
        assert status == 0, printed


@pytest.mark.mutation
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_the_mistake_is_caught(mistake: Mistake, copy: Path, tally: dict[str, str]) -> None:
    path = copy / mistake.file
    path.write_text(path.read_text().replace(mistake.old, mistake.new))
    status, printed = run_tests(copy, mistake.caught_by)
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, flags=re.MULTILINE)
    assert status == (TESTS_FAILED if failed else 0), f"pytest ended with {status}:\n{printed}"
    tally[mistake.name] = failed[0] if failed else ""
    assert failed, f"{mistake.caught_by} does not notice: {mistake.name}"
