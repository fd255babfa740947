"""The demonstration behind `prefixattn demo`: real text, a real model, PEFT beside us."""
