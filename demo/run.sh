#!/bin/sh
# The main job, on a real small adapter: from a mysterious folder to a merged model that does what the adapter was trained for.
set -eu
cd "$(dirname "$0")/.."
rm -rf demo-out && mkdir demo-out
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { say "\$ $*"; "$@"; }

say "Someone left a folder with two pickled files. What is it?"
run upparam identify demo/mystery
say "A triad: up + down + config. Put it together as a PEFT adapter."
run upparam assemble demo/mystery --to peft -o demo-out/adapter
say "Is it sound, and does it fit the base?"
run upparam verify demo-out/adapter --base demo/base
say "Bake it into the base: W + alpha/r * up @ down, rounded once."
run upparam merge demo/base demo-out/adapter -o demo-out/merged
say "The base repeats a word. The adapter was trained to shout it. Does the merged model?"
run python demo/check.py demo/base demo-out/merged
