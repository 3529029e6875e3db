#!/usr/bin/env bash
# The main job on the bundled text: prep, pretrain, evaluate, sample, export. Run by `make demo`; everything lands in
# demo/. Run again, it goes on where it was: finished steps are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${DEMO_DIR:-demo}

say() { printf '\n== %s\n' "$*"; }

say "prep: six novels into tokenized shards ($out/data)"
bd3 prep corpora/austen.jsonl.gz --out "$out/data" --length 128 --tokenizer bpe:1024

say "pretrain: preset tiny-cpu ($out/run)"
bd3 pretrain --preset tiny-cpu --data.path "$out/data" --run "$out/run"

say "eval: the whole validation split"
bd3 eval "$out/run"

say "sample: two continuations of one prompt"
bd3 sample "$out/run" --prompt "It was a truth" --tokens 100 --count 2 --seed 1

say "export: a Hugging Face folder ($out/export)"
rm -rf "$out/export"
bd3 convert export "$out/run" "$out/export"
python - "$out/export" <<'PY'
import sys

from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
ids = model.generate(max_new_tokens=24)
print("loaded by transformers; it writes:", tokenizer.decode(ids[0], skip_special_tokens=True))
PY

say "done"
cat <<TEXT
data set        $out/data           manifest.json, tokenizer.json, train/*.tar, validation/*.tar
run             $out/run            config.yaml, metrics.jsonl, throughput.jsonl, tensorboard/, checkpoints/
loss curves     $out/run/curves.png
exported model  $out/export         AutoModelForMaskedLM.from_pretrained("$out/export", trust_remote_code=True)
TEXT
