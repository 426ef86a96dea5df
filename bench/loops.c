/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The inner loops of the suite as a C test would write them, to time the Python ones against.
 */
#include <stddef.h>
#include <stdint.h>

#define WORDS_PER_PAGE 512

struct gfn {
	uint32_t flags;
	uint32_t slot;
	uint64_t offset;
};

/* Compare the first word of each page with what is expected, and count the pages that the bitmap reports. */
size_t verify(const volatile uint64_t *memory, const uint64_t *bitmap, const uint64_t *expected, size_t npages,
	      size_t *dirty)
{
	size_t wrong = 0;

	*dirty = 0;
	for (size_t page = 0; page < npages; page++) {
		wrong += memory[page * WORDS_PER_PAGE] != expected[page];
		*dirty += bitmap[page / 64] >> page % 64 & 1;
	}
	return wrong;
}

/* Take the dirty entries from a ring, in order, into two arrays, and mark them as harvested. */
size_t harvest(struct gfn *ring, size_t entries, size_t next, uint32_t *slots, uint64_t *offsets)
{
	size_t count = 0;

	for (;; count++) {
		struct gfn *entry = &ring[(next + count) % entries];

		if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != 1)
			return count;
		slots[count] = entry->slot;
		offsets[count] = entry->offset;
		__atomic_store_n(&entry->flags, 2, __ATOMIC_RELEASE);
	}
}
