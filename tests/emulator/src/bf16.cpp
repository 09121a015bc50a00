#include "entries.h"
ENTRIES(bf16, bf16)
