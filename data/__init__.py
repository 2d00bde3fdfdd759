"The tiny world and what else travels in the wheel."
