# SPDX-License-Identifier: GPL-2.0-only
#
# Checks whether an emulated CPU does what KVM and this suite need. QEMU boots this program in place of a kernel; it runs
# guests as KVM does, and prints on the debug console how each exited. emulator_probe.py has the right answers.
#
# A line per check: its name, "=", EXITCODE, EXITINFO1, EXITINFO2 and a value of the check's own, all in hex; or its name and
# "absent" if CPUID lacks a feature that it needs. If the machine crashes, the last line is incomplete.

	.set CONSOLE, 0xe9		# QEMU's isa-debugcon
	.set EXIT_PORT, 0xf4		# its isa-debug-exit

	.set PAGE, 0x1000
	.set HUGE_PAGE, 0x200000

	.set EFER, 0xc0000080
	.set EFER_LME, 1 << 8
	.set EFER_LMA, 1 << 10
	.set EFER_SVME, 1 << 12
	.set GUEST_EFER, EFER_LME | EFER_LMA | EFER_SVME
	.set VM_HSAVE_PA, 0xc0010117
	.set CR0_PE, 1 << 0
	.set CR0_MP, 1 << 1
	.set CR0_ET, 1 << 4
	.set CR0_NE, 1 << 5
	.set CR0_WP, 1 << 16
	.set CR0_PG, 1 << 31
	.set HOST_CR0, CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG
	.set CR4_PAE, 1 << 5
	.set CR4_OSFXSR, 1 << 9
	.set CR4_OSXSAVE, 1 << 18
	.set XCR0_AVX, 7		# and what it depends on: x87 and SSE

	# Page table entries, also nested ones
	.set PRESENT, 1 << 0
	.set WRITABLE, 1 << 1
	.set USER, 1 << 2
	.set ACCESSED, 1 << 5
	.set DIRTY, 1 << 6
	.set HUGE, 1 << 7

	# The control block (AMD APM volume 2, appendix B)
	.set INTERCEPT_EXCEPTIONS, 0x08
	.set INTERCEPT_MISC1, 0x0c
	.set INTERCEPT_MISC2, 0x10
	.set ASID, 0x58
	.set TLB_CONTROL, 0x5c
	.set EXIT_CODE, 0x70
	.set EXIT_INFO_1, 0x78
	.set EXIT_INFO_2, 0x80
	.set NESTED_PAGING, 0x90
	.set NESTED_ROOT, 0xb0
	.set SAVED_ES, 0x400
	.set SAVED_CS, 0x410
	.set SAVED_SS, 0x420
	.set SAVED_DS, 0x430
	.set SAVED_EFER, 0x4d0
	.set SAVED_CR4, 0x548
	.set SAVED_CR3, 0x550
	.set SAVED_CR0, 0x558
	.set SAVED_DR7, 0x560
	.set SAVED_DR6, 0x568
	.set SAVED_RFLAGS, 0x570
	.set SAVED_RIP, 0x578
	.set SAVED_RSP, 0x5d8
	.set SAVED_PAT, 0x668
	.set HLT_OR_SHUTDOWN, 1 << 24 | 1 << 31
	.set VMRUN_VMMCALL_XSETBV, 1 << 0 | 1 << 1 | 1 << 13
	.set LIMIT, 4			# of a segment: after its selector and attributes, before its base
	.set BASE, 8
	.set CODE_16, 0x09b << 16	# attributes: type, present, long, granularity
	.set CODE_64, 0xa9b << 16
	.set DATA, 0xc93 << 16

	# All page tables map these huge pages one to one, this program among them, except for the one with the guest's test
	# memory. Its pages are mapped one by one: by the guest's tables from the same address, by the nested ones from another,
	# so that a walk that skips one of them finds wrong memory. Its last page is the guest's table for it.
	.set HUGE_PAGES, 8
	.set TEST, 2 * HUGE_PAGE
	.set BEHIND_TEST, 3 * HUGE_PAGE
	.set TEST_PAGES, 512
	.set GUEST_TABLE, TEST + (TEST_PAGES - 1) * PAGE

	# Features that a check needs, in %ebp
	.set HAS_NESTED_PAGING, 1 << 0
	.set HAS_XSAVE, 1 << 1
	.set HAS_AVX, 1 << 2

	# check name, memory, needs ... end_check: the guest of a check, with its test memory at *memory*: BEHIND_TEST for one
	# with nested paging, else TEST. Its own value is %rdx at the end.
	.macro check name, memory, needs
	.pushsection .rodata
9:	.asciz "\name"
	.popsection
	lea 9b(%rip), %rsi
	mov $\memory, %r14d
	mov $\needs, %r15d
	call begin_check
	jc 7f
	.endm

	.macro end_check
	call report
7:
	.endm

	# Run the guest from *code* to its exit.
	.macro run code
	mov $\code, %eax
	mov %rax, vmcb + SAVED_RIP
	lea vmcb(%rip), %rax
	vmrun %rax
	.endm

	.macro print text
	.pushsection .rodata
9:	.asciz "\text"
	.popsection
	lea 9b(%rip), %rsi
	call print_text
	.endm

	# Page tables: three levels, the last with huge pages. *test* is the target of the entry for the test memory.
	.macro page_tables name, test
	.balign PAGE
\name:	.quad 1f + USER + WRITABLE + PRESENT
	.balign PAGE
1:	.quad 2f + USER + WRITABLE + PRESENT
	.balign PAGE
2:	.set page, 0
	.rept HUGE_PAGES
	.if page == TEST
	.quad \test
	.else
	.quad page + HUGE + USER + WRITABLE + PRESENT
	.endif
	.set page, page + HUGE_PAGE
	.endr
	.balign PAGE
	.endm

	.data
	page_tables host_root, TEST + HUGE + USER + WRITABLE + PRESENT
	page_tables guest_root, GUEST_TABLE + USER + WRITABLE + PRESENT
	page_tables nested_root, nested_table + USER + WRITABLE + PRESENT
gdt:
	.quad 0, 0x00af9b000000ffff	# null, 64-bit code
	.set CODE_SELECTOR, 8
gdt_pointer:
	.word . - gdt - 1
	.long gdt

	.bss
	.balign PAGE
nested_table:
	.skip PAGE
vmcb:
	.skip PAGE
host_save_area:
	.skip PAGE
	.skip PAGE
stack:

	# QEMU starts at the address in this note, in 32-bit protected mode without paging (Xen's PVH boot protocol).
	.section .note.Xen, "a", @note
	.long 4, 8, 18			# sizes of name and content, XEN_ELFNOTE_PHYS32_ENTRY
	.asciz "Xen"
	.quad guest_main

	.text
	.code32
	.globl guest_main
guest_main:
	mov $CR4_PAE | CR4_OSFXSR, %eax
	mov %eax, %cr4
	mov $host_root, %eax
	mov %eax, %cr3
	mov $EFER, %ecx
	xor %edx, %edx
	mov $EFER_LME, %eax
	wrmsr
	mov $HOST_CR0, %eax
	mov %eax, %cr0
	lgdt gdt_pointer
	ljmp $CODE_SELECTOR, $long_mode

	.code64
long_mode:
	lea stack(%rip), %rsp
	mov $0x80000001, %eax
	cpuid
	bt $2, %ecx
	jc has_svm
	print "svm absent\n"
	jmp done
has_svm:
	mov $0x8000000a, %eax
	cpuid
	mov %edx, %ebp
	and $HAS_NESTED_PAGING, %ebp	# the same bit there
	mov $1, %eax
	cpuid
	bt $26, %ecx
	jnc 1f
	or $HAS_XSAVE, %ebp
	bt $28, %ecx
	jnc 1f
	or $HAS_AVX, %ebp
1:	mov $EFER, %ecx
	xor %edx, %edx
	mov $GUEST_EFER, %eax
	wrmsr
	mov $VM_HSAVE_PA, %ecx
	lea host_save_area(%rip), %rax
	wrmsr
	clgi
	jmp checks

# Print the name %rsi, and prepare a guest with test memory at %r14.
# Carry is set, and the check is over, if the CPU lacks a feature of %r15.
begin_check:
	call print_text
	mov %r15d, %eax
	not %ebp
	test %ebp, %eax
	not %ebp
	jz 1f
	print " absent\n"
	stc
	ret
1:	print "="
	mov %r14, %rdi			# the guest's memory: clear the first pages; the last one is its table
	xor %eax, %eax
	mov $4 * PAGE / 8, %ecx
	rep stosq
	lea (TEST_PAGES - 1) * PAGE(%r14), %rdi
	mov $TEST + WRITABLE + PRESENT, %eax
	call fill_table
	lea nested_table(%rip), %rdi
	mov $BEHIND_TEST + USER + WRITABLE + PRESENT, %eax
	call fill_table
	lea vmcb(%rip), %rdi
	mov %rdi, %rbx
	xor %eax, %eax
	mov $PAGE / 8, %ecx
	rep stosq
	movl $-1, INTERCEPT_EXCEPTIONS(%rbx)
	movl $HLT_OR_SHUTDOWN, INTERCEPT_MISC1(%rbx)
	movl $VMRUN_VMMCALL_XSETBV, INTERCEPT_MISC2(%rbx)
	movl $1, ASID(%rbx)
	movb $1, TLB_CONTROL(%rbx)	# flush everything on each VMRUN
	cmp $BEHIND_TEST, %r14d
	jne 1f
	movb $1, NESTED_PAGING(%rbx)
	lea nested_root(%rip), %rax
	mov %rax, NESTED_ROOT(%rbx)
1:	movl $DATA, SAVED_ES(%rbx)
	movl $CODE_64, SAVED_CS(%rbx)
	movl $DATA, SAVED_SS(%rbx)
	movl $DATA, SAVED_DS(%rbx)
	movl $-1, SAVED_ES + LIMIT(%rbx)
	movl $-1, SAVED_CS + LIMIT(%rbx)
	movl $-1, SAVED_SS + LIMIT(%rbx)
	movl $-1, SAVED_DS + LIMIT(%rbx)
	movl $GUEST_EFER, SAVED_EFER(%rbx)
	mov %cr4, %rax
	mov %rax, SAVED_CR4(%rbx)
	lea guest_root(%rip), %rax
	mov %rax, SAVED_CR3(%rbx)
	mov $HOST_CR0, %eax
	mov %rax, SAVED_CR0(%rbx)
	movl $1 << 10, SAVED_DR7(%rbx)	# the values at reset
	movl $0xffff0ff0, SAVED_DR6(%rbx)
	movl $1 << 1, SAVED_RFLAGS(%rbx)
	lea TEST + 4 * PAGE, %rax
	mov %rax, SAVED_RSP(%rbx)
	mov $0x0007040600070406, %rax
	mov %rax, SAVED_PAT(%rbx)
	clc
	ret

# Fill the table %rdi with entries for consecutive pages, %rax first.
fill_table:
	mov $TEST_PAGES, %ecx
1:	stosq
	add $PAGE, %rax
	loop 1b
	ret

# Print how the guest exited, and %rdx.
report:
	push %rdx
	mov vmcb + EXIT_CODE, %rdx
	call print_number
	mov vmcb + EXIT_INFO_1, %rdx
	call print_number
	mov vmcb + EXIT_INFO_2, %rdx
	call print_number
	pop %rdx
	call print_number
	print "\n"
	ret

print_text:
	lodsb
	test %al, %al
	jz 1f
	out %al, $CONSOLE
	jmp print_text
1:	ret

print_number:
	print " "
	mov $16, %ecx
1:	rol $4, %rdx
	mov %edx, %eax
	and $15, %eax
	movzbl digits(%rax), %eax
	out %al, $CONSOLE
	loop 1b
	ret

	.section .rodata
digits:
	.ascii "0123456789abcdef"
pattern:
	.ascii "0123456789abcdefghijklmnopqrstuv"
	.set PATTERN_SIZE, . - pattern
	.set STRADDLING, PAGE - 5	# crosses a page boundary there

# --- the guests: each runs to its vmmcall, unless it exits before ---

	.text
guest_nothing:
	vmmcall

guest_store:
	mov $TEST, %edi
	mov %rdi, (%rdi)
	vmmcall

guest_load:
	mov $TEST, %edi
	mov (%rdi), %rax
	vmmcall

guest_failed_exchange:
	mov $TEST, %edi
	mov $1, %eax			# memory holds 0
	lock cmpxchg %rdi, (%rdi)
	vmmcall

guest_string_store:
	mov $TEST, %edi
	mov $PAGE / 8 + 1, %ecx
	mov $-1, %rax
	rep stosq
	vmmcall

guest_set_xcr0:
	xor %ecx, %ecx
	mov $XCR0_AVX, %eax
	xor %edx, %edx
	xsetbv
	vmmcall

guest_vector_store:
	vmovups pattern(%rip), %ymm0
	vmovups %ymm0, TEST + STRADDLING
	vmmcall

# Set %rdx to whether the pattern is where the guest of %r14 stored it.
find_pattern:
	xor %edx, %edx
	lea STRADDLING(%r14), %rdi
	lea pattern(%rip), %rsi
	mov $PATTERN_SIZE, %ecx
	repe cmpsb
	sete %dl
	ret

# With AVX enabled, as KVM does it just before VMRUN
run_vector_store:
	xor %ecx, %ecx
	mov $XCR0_AVX, %eax
	xor %edx, %edx
	xsetbv
	run guest_vector_store
	jmp find_pattern

checks:
	test $HAS_XSAVE, %ebp
	jz 1f
	mov %cr4, %rax
	or $CR4_OSXSAVE, %rax
	mov %rax, %cr4
1:
	check "plain", TEST, 0
	run guest_nothing
	end_check

	check "nested", BEHIND_TEST, HAS_NESTED_PAGING
	run guest_nothing
	end_check

	# The guest's new value must not reach XCR0, and the guest must exit to KVM.
	check "xsetbv", TEST, HAS_XSAVE | HAS_AVX
	run guest_set_xcr0
	xor %ecx, %ecx
	xgetbv
	mov %eax, %edx
	end_check

	check "avx-store", TEST, HAS_XSAVE | HAS_AVX
	call run_vector_store
	end_check

	check "avx-store-nested", BEHIND_TEST, HAS_NESTED_PAGING | HAS_XSAVE | HAS_AVX
	call run_vector_store
	end_check

	# Accessed and dirty bits of the guest's tables: in bits 0 to 11 of the value; of the nested ones: from bit 12 on.
	check "load-marks", TEST, 0
	run guest_load
	call marks
	end_check

	check "store-marks", TEST, 0
	run guest_store
	call marks
	end_check

	check "load-marks-nested", BEHIND_TEST, HAS_NESTED_PAGING
	run guest_load
	call marks
	end_check

	check "store-marks-nested", BEHIND_TEST, HAS_NESTED_PAGING
	run guest_store
	call marks
	end_check

	# A page is write-protected after it was written, as KVM does when the dirty log is collected.
	check "store-protected-again", BEHIND_TEST, HAS_NESTED_PAGING
	run guest_store
	andb $~WRITABLE, nested_table
	run guest_store
	xor %edx, %edx
	end_check

	check "load-protected", BEHIND_TEST, HAS_NESTED_PAGING
	andb $~WRITABLE, nested_table
	run guest_load
	xor %edx, %edx
	end_check

	check "failed-exchange-protected", BEHIND_TEST, HAS_NESTED_PAGING
	andb $~WRITABLE, nested_table
	run guest_failed_exchange
	xor %edx, %edx
	end_check

	# The value: what the string store has left to do at the protected page.
	check "string-store-protected", BEHIND_TEST, HAS_NESTED_PAGING
	andb $~WRITABLE, nested_table + 8
	run guest_string_store
	mov %rcx, %rdx
	end_check

	check "load-absent", BEHIND_TEST, HAS_NESTED_PAGING
	movb $0, nested_table
	run guest_load
	xor %edx, %edx
	end_check

	# The guest's own page table is write-protected, and the walk has to set an accessed bit in it.
	check "walk-protected", BEHIND_TEST, HAS_NESTED_PAGING
	andb $~WRITABLE, nested_table + 8 * (TEST_PAGES - 1)
	run guest_load
	xor %edx, %edx
	end_check

	# The nested tables lead to a vmmcall; at the guest's own address is a hlt.
	check "real-mode-nested", BEHIND_TEST, HAS_NESTED_PAGING
	movl $0xd9010f, BEHIND_TEST
	movb $0xf4, TEST
	movl $CODE_16, vmcb + SAVED_CS
	movl $0xffff, vmcb + SAVED_CS + LIMIT
	movl $TEST, vmcb + SAVED_CS + BASE
	movl $EFER_SVME, vmcb + SAVED_EFER
	movl $CR0_ET, vmcb + SAVED_CR0
	movl $0, vmcb + SAVED_CR4
	run 0
	xor %edx, %edx
	end_check

done:
	xor %eax, %eax
	out %eax, $EXIT_PORT
1:	hlt
	jmp 1b

marks:
	mov nested_table, %edx
	and $PAGE - 1, %edx
	shl $12, %edx
	mov (TEST_PAGES - 1) * PAGE(%r14), %eax
	and $PAGE - 1, %eax
	or %eax, %edx
	ret
