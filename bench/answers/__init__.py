"""The main benchmark: choosing the right answer to a question with a siamese LSTM and pairwise attention."""
