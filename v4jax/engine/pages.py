"""Which pages of the pools are in use, and by how many owners."""


class OutOfPages(Exception):
    """No page is free."""


class Pages:
    """Reference counts of the pages 0 .. count - 1.

    A page may be written by the owner that took it, and only where no other owner reads. Each group
    of rows has an equal part of the pages, one after the other.
    """

    def __init__(self, count: int, groups: int = 1) -> None:
        self._references = [0] * count
        self._each = each = count // groups
        self._free = [[*reversed(range(g * each, (g + 1) * each))] for g in range(groups)]

    @property
    def count(self) -> int:
        """Number of pages."""
        return len(self._references)

    @property
    def groups(self) -> int:
        """Number of groups of rows."""
        return len(self._free)

    @property
    def free(self) -> int:
        """Number of pages without an owner."""
        return sum(map(len, self._free))

    def free_in(self, group: int) -> int:
        """Number of a group's pages without an owner."""
        return len(self._free[group])

    def group(self, page: int) -> int:
        """The group that has a page."""
        return page // self._each

    def references(self, page: int) -> int:
        """Number of owners of a page."""
        return self._references[page]

    def take(self, group: int = 0) -> int:
        """Take a free page of a group, whose content is undefined.

        Raises:
          OutOfPages: there is none.
        """
        if not self._free[group]:
            raise OutOfPages(f"all {self._each} pages of group {group} are in use")
        page = self._free[group].pop()
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """Add an owner to a page that has one."""
        assert self._references[page], f"page {page} is free and cannot be shared"
        self._references[page] += 1

    def drop(self, page: int) -> None:
        """Remove an owner; without any, the page is free."""
        assert self._references[page], f"page {page} is already free"
        self._references[page] -= 1
        if not self._references[page]:
            self._free[self.group(page)].append(page)
