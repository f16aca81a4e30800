"""What `v4jax --help` and `v4jax COMMAND --help` print below the options."""

EPILOG = """\
exit status: 0 done, 1 failed, 2 misuse. Results go to stdout, everything else to stderr.

examples:
  v4jax demo
  v4jax inspect flash
  v4jax plan flash --topology v6e:2x4
  v4jax convert deepseek-ai/DeepSeek-V4-Flash flash-native
  v4jax generate flash-native --chat -p "Why is the sky blue?" --thinking high
  v4jax chat flash-native
  v4jax export flash-native flash-hf
  v4jax export-adapter runs/a adapter
  v4jax merge flash-hf runs/a flash-tuned --weights bfloat16
  v4jax launch train.toml --on slurm --topology h200:2x8 --dry-run
"""
INSPECT = """\
For a directory, the headers of its files are read and checked; the weights are not read. For a Hub
id, only config.json is downloaded. For a Hub id, a config.json or a preset, bytes are those of a
release with this configuration.

presets: {presets}

examples:
  v4jax inspect pro
  v4jax inspect path/to/checkpoint
  v4jax inspect deepseek-ai/DeepSeek-V4-Pro
  v4jax inspect flash --kernels v6e
"""
CONVERT = """\
A native checkpoint stores arrays as the model has them in memory, and loads faster. The source is
checked before anything is written. Output is written to TARGET.unfinished and becomes TARGET when
it is complete; after an interruption, the same command resumes. A source on the Hub is downloaded
shard by shard, with one shard on disk at a time; one behind a URL (gs://, s3://, https://) is read
tensor by tensor, and needs the extra 'bucket'. Files other than weights are copied, except hidden
files and weights in other formats.
Several processes, started with --distributed or with all three of --coordinator, --processes and
--process, share the work; if one fails, all fail.

examples:
  v4jax convert path/to/DeepSeek-V4-Flash flash-native
  v4jax convert gs://bucket/DeepSeek-V4-Flash flash-native
  v4jax convert deepseek-ai/DeepSeek-V4-Flash flash-native --weights bfloat16
"""
EXPORT = """\
This restores the files that were converted. From a checkpoint written with --weights keep, tensors
and all files other than weights are restored byte for byte; only the headers of weight files are
written again. TARGET appears when it is complete; after an interruption, the same command resumes.
Several processes share the files, as with 'v4jax convert'.

example:
  v4jax export flash-native flash-hf
"""
EXPORT_ADAPTER = """\
RUN is the directory of a training run with an adapter. ADAPTER can be loaded by Hugging Face's PEFT
on top of the transformers model, by 'v4jax generate --adapter' and by 'v4jax merge'.

examples:
  v4jax export-adapter runs/a adapter
  v4jax export-adapter runs/a adapter --best --model path/to/DeepSeek-V4-Flash
"""
MERGE = """\
RELEASE is a Hugging Face checkpoint, CHANGE a training run or a PEFT adapter. TARGET has the tensor
names of RELEASE and its other files. It appears when it is complete; after an interruption, the
same command resumes.
With --weights keep, each changed tensor is written in its original format, and all other tensors
keep their bytes. Rounding to that format loses part of the update; in FP4, a small update is lost
almost entirely. A table shows how much remains (gain: 1 all of it, 0 none; cosine: 1 if its
direction is unchanged).

examples:
  v4jax merge flash-hf runs/a flash-tuned --weights bfloat16
  v4jax merge flash-hf adapter flash-tuned --weights keep
"""
GENERATE = """\
The prompt is passed to the model unchanged; with --chat it is a user message, encoded in the
checkpoint's own chat format. Generation stops at an end-of-sequence token or after --max-tokens.
Programs are compiled on first use, which takes a while, and again for much longer texts.
With --mesh, weights are sharded over all devices: 'expert' and 'fsdp' shard the experts, 'tensor'
the heads and the vocabulary.

examples:
  v4jax generate path/to/checkpoint -p "Once upon a time" --temperature 0
  v4jax generate path/to/checkpoint --chat -p - --thinking max --max-tokens 4096 < question.txt
  v4jax generate path/to/checkpoint --adapter runs/a -p "Once upon a time"
  v4jax generate path/to/checkpoint --mesh tensor=4 --keep-quantised -p "Once upon a time"
"""
DEMO = """\
The model is a 4 MB checkpoint with DeepSeek's tensor names, FP8 matrices, FP4 experts, an MTP block
and a tokenizer. 'v4jax-train demo' trained it on CPython's documentation. Every command that takes
a checkpoint accepts 'tiny' as the name of this model.

examples:
  v4jax demo
  v4jax generate tiny -p "Return a list of"
  v4jax demo --directory copy-of-tiny
"""
