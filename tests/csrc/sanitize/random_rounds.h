#pragma once

#include <map>
#include <random>
#include <string>

// Rounds of a few requests that come and go; counts what happened.
void random_rounds(long rounds, std::mt19937_64& random, std::map<std::string, long>& happened);
