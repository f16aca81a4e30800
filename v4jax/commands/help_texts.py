"""What `v4jax COMMAND --help` says below the options."""

EPILOG = """\
exit status: 0 done, 1 failed, 2 misuse. Results go to standard output, all else to standard error.

examples:
  v4jax demo
  v4jax inspect flash
  v4jax convert deepseek-ai/DeepSeek-V4-Flash flash-native
  v4jax generate flash-native --chat -p "Why is the sky blue?" --thinking high
  v4jax export flash-native flash-hf
  v4jax export-adapter runs/a adapter
  v4jax merge flash-hf runs/a flash-tuned --weights bfloat16
"""
INSPECT = """\
A directory's headers are read and checked, its weights are not. Of a Hub id only config.json is
downloaded. A config.json or a preset says what its release would hold.

presets: {presets}

examples:
  v4jax inspect pro
  v4jax inspect path/to/checkpoint
  v4jax inspect deepseek-ai/DeepSeek-V4-Pro
  v4jax inspect flash --kernels v6e
"""
CONVERT = """\
A native checkpoint holds the arrays as the model has them in memory: it loads faster, and on many
hosts each reads its own part. The source is checked before anything is written. TARGET appears when
it is complete; until then all lies in TARGET.unfinished, and the same command goes on there after
an interruption. Of a Hub id one shard at a time is on the disk. All files beside the weights come
along, but for hidden ones and weights in other formats.

examples:
  v4jax convert path/to/DeepSeek-V4-Flash flash-native
  v4jax convert deepseek-ai/DeepSeek-V4-Flash flash-native --weights bfloat16
"""
EXPORT = """\
The files are those that were converted. Of a checkpoint made with --weights keep, tensors and all
files beside the weights are the same byte for byte; headers of the weights' files are written anew.
TARGET appears when it is complete; the same command goes on after an interruption.

example:
  v4jax export flash-native flash-hf
"""
EXPORT_ADAPTER = """\
RUN is the directory of a training run with an adapter; its newest state is taken. ADAPTER is for
Hugging Face's PEFT over transformers' model, and for 'v4jax generate --adapter' and 'v4jax merge'.

examples:
  v4jax export-adapter runs/a adapter
  v4jax export-adapter runs/a adapter --best --model path/to/DeepSeek-V4-Flash
"""
MERGE = """\
RELEASE is a Hugging Face directory, CHANGE a training run or a PEFT adapter. TARGET has RELEASE's
names and files, those beside the weights too; it appears when it is complete, and the same command
goes on after an interruption.
With --weights keep each changed tensor goes back into its own format and all others keep their
bytes. Rounding takes a part of the change away, of a small one in FP4 nearly all: the table says
how much is left (gain: 1 all of it, 0 none; cosine: whether what is left points the same way).

examples:
  v4jax merge flash-hf runs/a flash-tuned --weights bfloat16
  v4jax merge flash-hf adapter flash-tuned --weights keep
"""
GENERATE = """\
Text is given to the model as it stands; with --chat it is one message of a conversation, in the
checkpoint's own format. The first run of a length compiles, which takes a while. The text ends at
the model's end-of-sequence token or after --max-tokens. With --mesh the weights are spread over all
devices: 'expert' and 'fsdp' share out experts, 'tensor' heads and the vocabulary.

examples:
  v4jax generate path/to/checkpoint -p "Once upon a time" --temperature 0
  v4jax generate path/to/checkpoint --chat -p - --thinking max --max-tokens 4096 < question.txt
  v4jax generate path/to/checkpoint --adapter runs/a -p "Once upon a time"
  v4jax generate path/to/checkpoint --mesh tensor=4 --keep-quantised -p "Once upon a time"
"""
DEMO = """\
The model has DeepSeek's tensor names, FP8 matrices, FP4 experts, an MTP block and a tokenizer, in
4 MB. 'v4jax-train demo' trained it on the text of CPython's documentation. Wherever a command takes
a checkpoint, 'tiny' is this model.

examples:
  v4jax demo
  v4jax generate tiny -p "Return a list of"
  v4jax demo --directory copy-of-tiny
"""
