"""What a GPU does with the step loop: numbers, bits and times, in one command. Must not import vLLM."""
