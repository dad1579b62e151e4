"""Published weights, in and out: safetensors files of Llama, Qwen, GPT-2 and ViT."""
