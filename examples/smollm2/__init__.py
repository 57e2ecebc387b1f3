"""SmolLM2-135M-Instruct as a Hugging Face directory, and Policy Split on one-digit sums."""
