"""Published weights of decoders, in and out: safetensors files of Llama, Qwen and GPT-2."""
