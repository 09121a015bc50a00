"""Tests of the driver that need no library under test: `python3 -m unittest discover benches/peers/cpu`.
With NumPy, also the float64 reference."""

import contextlib
import io
import json
import os
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import argparse

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import report
import turns

try:
    import numpy as np
except ImportError:
    np = None


def timed(peer, ms, **fields):
    row = {
        "op": "attention",
        "pass": "forward",
        "threads": 1,
        "case": "20",
        "tokens": 16384,
        "peer": peer,
        "ms": ms,
        "median_ms": ms,
        "calls": 7,
        "load": 0.1,
    }
    return {**row, **fields}


ABOUT = {
    "machine": {"processor": "Intel(R) Xeon(R) CPU E5 @ 2.20GHz", "features": ["avx2"], "cores": 2},
    "commit": "abc1234",
    "date": "2026-11-27T05:00:00+00:00",
    "versions": {"torch": "2.15.0", "jax": None, "python": "3.13.0", "rustc": "rustc 1.95.0"},
    "load_before": [0.1, 0.2, 0.3],
    "load_after": [1.5, 1.0, 0.5],
    "quick": False,
}


class Table(unittest.TestCase):
    def test_the_ratio_is_that_of_the_fastest_peer_and_f32_peers_are_compared_separately(self):
        rows = [
            timed("dfar f32", 2.0),
            timed("torch eager f32", 9.0),
            timed("jax jitted f32", 6.0),
            timed("torch eager bf16", 3.0),
            timed("dfar f32", 1.0, threads=2),
            timed("jax jitted f32", 0.5, threads=2),
            timed("dfar f32", 1.0, case="50"),
        ]
        one, two = report.ratios(rows)
        self.assertEqual((one["best"], one["ratio"]), ("torch eager bf16", 1.5))
        self.assertEqual((one["best_f32"], one["ratio_f32"]), ("jax jitted f32", 3.0))
        self.assertEqual((two["threads"], two["best"], two["ratio"]), (2, "jax jitted f32", 0.5))

    def test_the_page_names_machine_versions_ratios_and_what_was_not_timed(self):
        rows = [
            timed("dfar f32", 2.0),
            timed("torch eager f32", 9.0),
            timed("dfar f32", 100.0, op="training", case="300", **{"pass": "step"}),
            timed("dfar bf16", 50.0, op="training", case="300", **{"pass": "step"}),
            timed("torch compiled f32", 250.0, op="training", case="300", **{"pass": "step"}),
            timed(
                "dfar",
                1000.0,
                op="import",
                case="9 rows",
                cpu_s=1.0,
                peak_mib=50.0,
                rows_per_cpu_s=2e6,
                **{"pass": "group-by"},
            ),
            timed(
                "polars scan_csv",
                900.0,
                op="import",
                case="9 rows",
                cpu_s=2.0,
                peak_mib=500.0,
                rows_per_cpu_s=1e6,
                **{"pass": "group-by"},
            ),
            {
                "op": "attention",
                "case": "16384",
                "threads": 1,
                "peer": "candle f32",
                "error": "its score matrices\nneed 20 GiB",
            },
        ]
        page = report.markdown(rows, ABOUT)
        for part in (
            "torch 2.15.0",
            "abc1234",
            "0.1, 0.2, 0.3",
            "1.5, 1.0, 0.5",
            "| forward | 1 | 20 | 2 | torch eager f32 | 4.5 | dfar f32 | torch eager f32 | 4.5 |",
            "| step | 1 | 300 | 100 | torch compiled f32 | 2.5 | dfar bf16 | torch compiled f32 | 5 |",
            "| reader and group-by | 1 | polars scan_csv | 900 | 0.9 | 1.00 | 500 |",
            "- candle f32, attention 16384: its score matrices need 20 GiB",
        ):
            self.assertIn(part, page)
        self.assertNotIn("jax", page)
        self.assertNotIn("quick run", page)
        self.assertIn("quick run", report.markdown(rows, {**ABOUT, "quick": True}))

    def test_the_compared_systems_have_medians_quartiles_and_errors(self):
        step = {"op": "systems", "case": "SASRec, x, 512 tokens", "pass": "step", "max_rel_err": 2e-6}
        of = lambda peer, ms: timed(
            peer, ms, **step, median_ms=2 * ms, low_ms=1.5 * ms, high_ms=3 * ms, instances_per_s=1e5
        )
        page = report.markdown([of("dfar f32", 2.0), of("torch eager f32", 5.0)], ABOUT)
        for part in (
            "| step | 1 | SASRec, x, 512 tokens | 2 | torch eager f32 | 2.5 |",
            "| SASRec, x, 512 tokens | 1 | torch eager f32 | 10 7.5 15 | 100000 | 2.5 | 2.0e-06 |",
        ):
            self.assertIn(part, page)

    def test_a_run_is_filed_under_its_machine_date_and_commit(self):
        with tempfile.TemporaryDirectory() as out, tempfile.TemporaryDirectory() as results:
            report.write_json(os.path.join(out, "environment.json"), ABOUT)
            with open(os.path.join(out, "rows.jsonl"), "w") as f:
                f.writelines(
                    json.dumps(row) + "\n"
                    for row in (timed("dfar f32", 2.0), timed("torch eager f32", 3.0))
                )
            with contextlib.redirect_stdout(io.StringIO()):
                report.write(out, out)
            folder = report.file(out, results)
            self.assertEqual(
                os.path.relpath(folder, results), "intel-xeon-e5-2-cores/2026-11-27-abc1234"
            )
            self.assertLessEqual(
                {"rows.jsonl", "environment.json", "table.md"}, set(os.listdir(folder))
            )

    def test_arguments(self):
        p = argparse.ArgumentParser()
        report.arguments(p)
        a = p.parse_args(["out", "--quick", "--only", "import", "--threads", "1", "4"])
        self.assertEqual(
            (a.out, a.quick, a.only, a.threads, a.results), ("out", True, "import", [1, 4], None)
        )
        with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            p.parse_args(["out", "--only", "everything"])


class Turns(unittest.TestCase):
    def test_every_round_calls_every_peer_once_and_begins_with_another(self):
        order = []

        def measure(name, times):
            return lambda: order.append(name) or times

        def broken():
            raise turns.Failed("out of memory")

        found = turns.interleave(
            {"a": measure("a", [0.003, 0.001]), "b": broken, "c": measure("c", [0.002])}, 3
        )
        self.assertEqual(order, ["a", "c", "c", "a", "c", "a"])
        self.assertEqual(found["a"], {"ms": 1.0, "median_ms": 1.0, "calls": 6})
        self.assertEqual(found["b"], {"error": "out of memory"})
        order.clear()
        slow = turns.interleave({"a": measure("a", [1.0]), "c": measure("c", [2.0])}, 3, {"c": 1})
        self.assertEqual((order, slow["c"]["calls"]), (["a", "c", "a", "a"], 1))

    def test_a_worker_answers_or_its_end_is_reported(self):
        program = "import sys, json\nfor line in sys.stdin: print(json.dumps({'threads': json.loads(line)['n']}), flush=True); break"
        with open(os.devnull, "w") as log:
            worker = turns.Worker([sys.executable, "-c", program], 1, log)
            self.assertEqual(worker.ask(n=3), {"threads": 3})
            with self.assertRaises(turns.Failed):
                worker.ask(n=4)
            worker.close()


@unittest.skipIf(np is None, "NumPy is not installed")
class Reference(unittest.TestCase):
    def test_its_gradients_are_finite_differences_of_its_output(self):
        import reference

        random = np.random.default_rng(0)
        q, k, v = random.standard_normal((3, 5, 4, 3))
        do, label = random.standard_normal((5, 2, 4, 3)), np.array([0, 1, 1, 0, 1])
        found = reference.sequence(q, k, v, do, label)
        for name, x in (("dq", q), ("dk", k), ("dv", v)):
            for at in ((0, 0, 0), (2, 3, 1), (4, 2, 2), (3, 1, 0)):
                values = []
                for step in (1e-6, -1e-6):
                    moved = x.copy()
                    moved[at] += step
                    args = [moved if other is x else other for other in (q, k, v)]
                    values.append((reference.sequence(*args, do, label)["o"] * do).sum())
                self.assertAlmostEqual(found[name][at], (values[0] - values[1]) / 2e-6, places=6)

    def test_buckets_hold_every_token_once(self):
        import buckets

        lengths = [20, 0, 7, 1, 300, 64, 65]
        found = buckets.buckets(lengths)
        self.assertEqual(
            sorted(np.concatenate([b.token[b.valid] for b in found])), list(range(sum(lengths)))
        )


@unittest.skipIf(np is None, "NumPy is not installed")
class Systems(unittest.TestCase):
    def batch(self):
        from systems import batch

        whole = lambda *values: np.array(values, np.int64)
        return batch.pack(
            {
                "cu_seqlens": whole(0, 3, 4),
                "item": whole(7, 5, 7, 9),
                "group_offsets": whole(0, 2, 3),
                "group_length": whole(0, 3, 1),
                "row_offsets": whole(0, 2, 4, 6),
                "row_pair": whole(0, 1, 0, 2, 3, 4),
                "pair_item": whole(5, 2, 9, 7, 2),
                "target": np.array([1, 0, 1, 0, 1, 0], np.float32),
            }
        )

    def test_padding_keeps_every_event_candidate_and_prefix(self):
        b = self.batch()
        self.assertEqual(b.touched.tolist(), [2, 5, 7, 9])
        self.assertEqual(b.touched[b.items[0]].tolist(), [7, 5, 7])
        self.assertEqual(b.touched[b.items[1, 0]], 9)
        self.assertEqual(b.touched[b.pair[b.candidate]].tolist(), [[5, 2], [5, 9], [7, 2]])
        self.assertEqual((b.last.tolist(), b.seen.ravel().tolist()), ([0, 2, 3], [0, 1, 1]))

    def test_instances_are_the_prefixes_with_one_candidate_each(self):
        from systems import batch

        b, one = self.batch(), batch.by_instance(self.batch())
        self.assertEqual(one.lengths.tolist(), [0, 0, 3, 3, 1, 1])
        self.assertEqual(one.touched[one.items[2]].tolist(), [7, 5, 7])
        self.assertEqual(one.pair[one.candidate].ravel().tolist(), b.pair[b.candidate].ravel().tolist())
        self.assertEqual((one.target.shape, one.last.tolist()), ((6, 1), [0, 0, 8, 11, 12, 15]))

    def test_groups_of_different_sizes_are_refused(self):
        from systems import batch

        whole = lambda *values: np.array(values, np.int64)
        x = {"cu_seqlens": whole(0, 1), "item": whole(0), "pair_item": whole(1)}
        with self.assertRaises(ValueError):
            batch.pack({**x, "row_offsets": whole(0, 1, 3)})

    def test_results_agree_within_the_tolerance_and_on_either_side_of_a_kink(self):
        from systems import agreement

        reference = {
            "0.loss": np.array([[0.5], [0.5]]),
            "0.grad.w": np.array([[10.0, 1.0], [10.0, 2.0]]),
            "0.grad.b": np.array([[1e-9], [1e-9]]),
        }
        found = {"0.loss": 0.5, "0.grad.w": [10.0, 1.5], "0.grad.b": 3e-7}
        found = {n: np.atleast_1d(x) for n, x in found.items()}
        each, above = agreement.judge(found, reference)
        self.assertAlmostEqual(max(each.values()), 2.99e-5, places=7)
        self.assertEqual(above, {})
        wrong = {**found, "0.grad.w": np.array([10.0, 2.002]), "0.loss": np.array([np.nan])}
        _, above = agreement.judge(wrong, reference)
        self.assertEqual(set(above), {"0.grad.w", "0.loss"})
        _, above = agreement.judge({**found, "0.loss": np.zeros(2)}, reference)
        self.assertEqual(set(above), {"0.loss"})


if __name__ == "__main__":
    unittest.main()
